"""Run directories, damaged, under ``--resume``."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from gmn_lopt.cli import meta_train
from gmn_lopt.meta.config import to_json
from gmn_lopt.meta.metrics import read_rows
from gmn_lopt.optimizers.saved import digest

from .mutations import FILES, Case, damaged_bytes, damaged_json, replace_file, write
from .outcomes import Refusal, command

REFUSALS = (Refusal,)
STATE = {"phi": {"log_alpha": jnp.arange(3.0), "w": jnp.arange(300.0).reshape(20, 15)}}
ARGUMENTS = ["--task", "linear_regression", "--optimizer", "sgdm", "--stage", "pes:meta_steps=4,truncation=5,pairs=2"]
NAMES = (
    "checksums.json",
    "config.json",
    "metrics.jsonl",
    "COMPLETE",
    "checkpoints",
    "events",
    ".lock",
    "checkpoints/4",
)


def make(directory: Path) -> None:
    """Write the run of four meta-steps that have taken no time."""
    with meta_train.open_run(meta_train.from_command_line(None, [*ARGUMENTS, "--out", str(directory)])) as run:
        for meta_step in range(1, 5):
            run.log({"meta_step": meta_step, "loss": meta_step / 3, "truncation_loss": [0.5, None]})
            if meta_step % 2 == 0:
                run.save(meta_step, saved_state(meta_step))


def read(directory: Path) -> Any:
    """Resume it: the settings, the latest checkpoint and its state, and the rows."""
    found = []

    def train(config: Any, run: Any, *_: Any) -> bool:
        state = run.restore(STATE) if run.latest else STATE
        settings = {name: value for name, value in to_json(config).items() if name not in ("out", "resume")}
        found.extend([settings, run.latest, digest(state), [row["meta_step"] for row in read_rows(run.path, 99)]])
        return True

    with mock.patch.object(meta_train, "train", train):
        command(meta_train.cli, ["--out", str(directory), "--resume"])
    return found


def read_sound(directory: Path) -> Any:
    """The settings, and whether the state is one that was saved: the latest, or an earlier one, or none yet.

    Rows have no checksum, and may be fewer.
    """
    settings, latest, state, rows = read(directory)
    return settings, state == digest(saved_state(latest)), rows == sorted({row for row in rows if 0 < row <= latest})


def read_any(directory: Path) -> None:
    """Resume it with whatever settings it has."""
    read(directory)


def saved_state(meta_step: int) -> Any:
    """The state after a meta-step."""
    return jax.tree.map(lambda x: x + meta_step, STATE)


def cases(pristine: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """All kinds of files, damage to the configuration and to one file of a checkpoint."""
    for name in NAMES:
        yield from (replace_file(name, kind) for kind in FILES)
    content = (pristine / "config.json").read_bytes()
    yield from damaged_bytes("config.json", content, rng, count)
    texts = list(damaged_json(json.loads(content)))
    for what, text in rng.sample(texts, min(count, len(texts))):
        yield write("config.json", text.encode(), what)
    files = sorted(path for path in (pristine / "checkpoints" / "4").rglob("*") if path.is_file())
    for _ in range(count):
        file = rng.choice(files)
        yield from damaged_bytes(str(file.relative_to(pristine)), file.read_bytes(), rng, 1)


def unsigned_cases(pristine: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """Settings of a run that has no checksum, as earlier versions wrote them."""
    config = json.loads((pristine / "config.json").read_text())
    del config["checksum"]
    texts = list(damaged_json(config))
    for what, text in rng.sample(texts, min(count, len(texts))):
        yield write("config.json", text.encode(), f"unsigned {what}")


def metrics_cases(pristine: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """A bad line anywhere, and damage anywhere."""
    content = (pristine / "metrics.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    bad = (b"\xff\n", b"3\n", b"{}\n", b"[" * 10**5 + b"\n", b"\n", b'{"meta_step": "1"}\n', b'{"meta_step": NaN}\n')
    bad += (b'{"meta_step": 1e400}\n', b'{"meta_step": -3}\n', b'{"meta_step": ' + b"1" * 5000 + b"}\n", b"\x00\n")
    for text in bad:
        for at in (0, 2, 4):
            yield write("metrics.jsonl", b"".join([*lines[:at], text, *lines[at:]]), f"{text[:30]!r} before {at}")
    yield from damaged_bytes("metrics.jsonl", content, rng, count)
