"""What else is read: cards of shipped optimizers, and the results that an evaluation goes on from."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from gmn_lopt.evaluation.results import Results
from gmn_lopt.optimizers import saved as saved_module
from gmn_lopt.optimizers import shipped
from gmn_lopt.optimizers.saved import SHIPPED, SerializationError
from gmn_lopt.util.errors import UsageError

from .mutations import FILES, Case, damaged_bytes, damaged_json, replace_file, write

REFUSALS = (SerializationError, UsageError)
CARD = f"{SHIPPED}/one/card.json"
SETTINGS = {"task": "a", "seeds": [0, 1], "horizon": 10, "loss_cap": 1.5}


def make(directory: Path) -> None:
    """A card, and results."""
    (directory / CARD).parent.mkdir(parents=True)
    (directory / CARD).write_text(json.dumps({"description": "one", "weights": {"count": 3}, "seeds": [1, 2]}))
    results = Results(directory / "results", SETTINGS)
    results.save("unit", "fingerprint", {"test_loss": np.arange(6.0).reshape(2, 3), "train_loss": np.ones((2, 3))})


def read_card(directory: Path) -> None:
    """The description of the one shipped optimizer, which has no checksum."""
    with (
        mock.patch.object(saved_module.resources, "files", lambda _: directory),
        mock.patch.object(shipped.resources, "files", lambda _: directory),
    ):
        assert all(isinstance(text, str) for text in shipped.list_pretrained().values())


def read_results(directory: Path) -> Any:
    """The results: those that were saved, or none, which are then computed anew."""
    found = Results(directory / "results", SETTINGS).load("unit", "fingerprint")
    return found is None or bool(np.array_equal(found["test_loss"], np.arange(6.0).reshape(2, 3)))


def card_cases(pristine: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """All kinds of files, and damage to the card."""
    yield from (replace_file(CARD, kind) for kind in FILES)
    content = (pristine / CARD).read_bytes()
    yield from damaged_bytes(CARD, content, rng, count)
    texts = list(damaged_json(json.loads(content)))
    for what, text in rng.sample(texts, min(count, len(texts))):
        yield write(CARD, text.encode(), what)


def results_cases(pristine: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """All kinds of files, and damage to the settings and to the arrays."""
    arrays = next((pristine / "results").glob("*.npz")).relative_to(pristine)
    for name in ("results/settings.json", str(arrays)):
        yield from (replace_file(name, kind) for kind in FILES)
        yield from damaged_bytes(name, (pristine / name).read_bytes(), rng, count)
    texts = list(damaged_json(SETTINGS))
    for what, text in rng.sample(texts, min(count, len(texts))):
        yield write("results/settings.json", text.encode(), what)
