"""Saved optimizers, editors and predictors, damaged.

And what somebody has changed and signed, which is not damage, but must do no harm.
"""

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gmn_lopt
from gmn_lopt.networks.editor import Editor
from gmn_lopt.networks.graph import GraphNetwork
from gmn_lopt.networks.saved_editor import EditorError, load_editor, save_editor
from gmn_lopt.optimizers import saved
from gmn_lopt.optimizers.recipes import RECIPES, Recipe
from gmn_lopt.optimizers.saved import SerializationError, digest, load_learned
from gmn_lopt.util.errors import FileError
from gmn_lopt.util.sealed import CONFIG_FILE, checksum

from .mutations import FILES, Case, damaged_bytes, damaged_json, replace_file, write

REFUSALS = (SerializationError, EditorError, FileError)
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


EDITOR, PREDICTOR = "editor", "predictor"
KINDS = (*OPTIMIZERS, EDITOR, PREDICTOR)
NETWORK = {"b": jnp.ones(3), "w": jnp.ones((2, 3))}


@functools.cache
def structure() -> gmn_lopt.GradientStructure:
    """That of a small model."""
    return gmn_lopt.analyze(lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones((3, 2)), jnp.ones((4, 3)))


def forward(params: Any, points: Any) -> tuple[Any]:
    """A network that an editor edits."""
    return (points @ params["w"] + params["b"],)


def weights_file(directory: Path) -> Path:
    """The one beside the configuration."""
    return next(directory.glob("*.safetensors"), directory / "none")


def sign(directory: Path) -> None:
    """Make the checksum right again, where there is a place for it."""
    file, weights = directory / CONFIG_FILE, weights_file(directory)
    if not all(path.is_file() and path.stat().st_size < 10**6 for path in (file, weights)):
        return
    try:
        config = json.loads(file.read_text())
        del config["checksum"]
        config["checksum"] = checksum(config, weights.read_bytes())
        file.write_text(json.dumps(config))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass


def make(directory: Path, name: str) -> None:
    """Save one."""
    key = jax.random.key(1)
    if name == EDITOR:
        editor = Editor(GraphNetwork(3, 1), ((0.0, 0.5),), gmn_lopt.GradMetaNetConfig(3, 1, out_features=2))
        module = editor.module(forward, NETWORK)
        save_editor(directory, editor, forward, NETWORK, module.init(key, NETWORK, jnp.ones((1, 3)))["params"])
    elif name == PREDICTOR:
        predictor = gmn_lopt.FisherPredictor(gmn_lopt.GradMetaNetConfig(3, 1))
        _, _, factors = gmn_lopt.value_grad_and_factors(lambda w, x: jnp.mean((x @ w) ** 2))(
            jnp.arange(6.0).reshape(3, 2), jnp.sin(jnp.arange(12.0)).reshape(4, 3)
        )
        several = jax.tree.map(lambda x: x[None], factors)
        weights = predictor.init(key, structure(), several, jnp.arange(6.0).reshape(1, 3, 2))
        gmn_lopt.save_predictor(directory, predictor, structure(), weights)
    else:
        lopt = OPTIMIZERS[name].build(structure())
        saved.save(directory, lopt, lopt.init(key))


def read(directory: Path, name: str) -> Any:
    """Load it: what it is, and the digest of its weights, or what they do."""
    if name == EDITOR:
        loaded = load_editor(directory, forward, NETWORK)
        return loaded.module.config, digest(loaded.weights)
    if name == PREDICTOR:
        found = gmn_lopt.load_predictor(directory, structure())
        of = structure()
        factors = [[jnp.ones(shape) for shape in shapes] for shapes in (of.activation_shapes, of.tangent_shapes)]
        return np.asarray(found(gmn_lopt.Factors(*map(tuple, factors)))).tolist()
    lopt, phi = load_learned(directory, structure())
    return Recipe.of(lopt), digest(phi)


def read_signed(directory: Path, name: str) -> None:
    """Sign it, and load whatever it has become."""
    sign(directory)
    read(directory, name)


def cases(pristine: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """All kinds of files, and as many kinds of damage to each of the two."""
    for name in (CONFIG_FILE, weights_file(pristine).name):
        yield from (replace_file(name, kind) for kind in FILES)
        yield from damaged_bytes(name, (pristine / name).read_bytes(), rng, count)
    yield from signed_cases(pristine, rng, count)


def signed_cases(pristine: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """Damage to the values of the configuration and to the header of the weights."""
    document = json.loads((pristine / CONFIG_FILE).read_text())
    texts = list(damaged_json(document))
    for what, text in rng.sample(texts, min(count, len(texts))):
        yield write(CONFIG_FILE, text.encode("utf-8", "surrogatepass"), what)
    content = weights_file(pristine).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    texts = list(damaged_json(header))
    for what, text in rng.sample(texts, min(count, len(texts))):
        changed = text.encode()
        whole = len(changed).to_bytes(8, "little") + changed + content[8 + size :]
        yield write(weights_file(pristine).name, whole, f"header: {what}")
