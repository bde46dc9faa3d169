"""Saved optimizers, damaged; and what somebody has changed and signed, which is not damage, but must do no harm."""

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import gmn_lopt
from gmn_lopt.optimizers import saved
from gmn_lopt.optimizers.recipes import RECIPES, Recipe
from gmn_lopt.optimizers.saved import CONFIG_FILE, WEIGHTS_FILE, SerializationError, digest, load_learned

from .mutations import FILES, Case, damaged_bytes, damaged_json, replace_file, write

REFUSALS = (SerializationError,)
OPTIMIZERS = {
    "ds+gmn": gmn_lopt.Recipe(
        gmn_lopt.Muon(),
        gmn_lopt.Residual(
            gmn_lopt.PaperFeatures(),
            gmn_lopt.PointwiseMLP(4, 1),
            gmn_lopt.SetReader(gmn_lopt.GradMetaNetConfig(3, 1, 1, 3, 2), 7, None, (0.5, 0.9)),
        ),
    ),
    "unf": Recipe(residual=gmn_lopt.Residual(network=gmn_lopt.UNF(3, 1)), rule=gmn_lopt.Additive(1.0)),
    "default": RECIPES["default"],
}


@functools.cache
def structure() -> gmn_lopt.GradientStructure:
    """That of a small model."""
    return gmn_lopt.analyze(lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones((3, 2)), jnp.ones((4, 3)))


def sign(directory: Path) -> None:
    """Make the checksum right again, where there is a place for it."""
    file, weights = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    if not all(path.is_file() and path.stat().st_size < 10**6 for path in (file, weights)):
        return
    try:
        config = json.loads(file.read_text())
        config.pop("checksum")
        config["checksum"] = saved._checksum(config, weights.read_bytes())
        file.write_text(json.dumps(config))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass


def make(directory: Path, name: str) -> None:
    """Save an optimizer."""
    lopt = OPTIMIZERS[name].build(structure())
    saved.save(directory, lopt, lopt.init(jax.random.key(1)))


def read(directory: Path) -> Any:
    """Load it: its recipe and the digest of its weights."""
    lopt, phi = load_learned(directory, structure())
    return Recipe.of(lopt), digest(phi)


def read_signed(directory: Path) -> None:
    """Sign it, and load whatever it has become."""
    sign(directory)
    read(directory)


def cases(pristine: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """All kinds of files, and as many kinds of damage to each of the two."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        yield from (replace_file(name, kind) for kind in FILES)
        yield from damaged_bytes(name, (pristine / name).read_bytes(), rng, count)
    yield from signed_cases(pristine, rng, count)


def signed_cases(pristine: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """Damage to the values of the configuration and to the header of the weights."""
    document = json.loads((pristine / CONFIG_FILE).read_text())
    texts = list(damaged_json(document))
    for what, text in rng.sample(texts, min(count, len(texts))):
        yield write(CONFIG_FILE, text.encode("utf-8", "surrogatepass"), what)
    content = (pristine / WEIGHTS_FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    texts = list(damaged_json(header))
    for what, text in rng.sample(texts, min(count, len(texts))):
        changed = text.encode()
        whole = len(changed).to_bytes(8, "little") + changed + content[8 + size :]
        yield write(WEIGHTS_FILE, whole, f"header: {what}")
