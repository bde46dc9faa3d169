"""The data: networks with random weights, the gradients of their outputs, and their Fisher matrices.

Each example is a network with two hidden layers of sines, its weights and biases standard normal. Its inputs are drawn
from a mixture of two halves of [-1, 1], ``p U[-1, 0] + (1 - p) U[0, 1]``, with ``p`` uniform on [0, 1] for each network
(the paper gives no formula for its distributions). Given are the gradients of the output at a few inputs; the target is
the diagonal of the Fisher matrix at many others. Everything follows from one seed; what is kept on disk are weights,
inputs and targets, from which gradients are computed where they are needed.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

import gmn_lopt
from gmn_lopt.util.arrays import read_arrays, write_arrays
from gmn_lopt.util.errors import FileError, first_line

CHUNK = 50  # networks whose targets are computed at a time
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class DataConfig:
    """What is drawn. Defaults are the paper's."""

    width: int = 32
    """Neurons of each of the two hidden layers."""
    points: int = 128
    """Inputs of each network whose gradients are given."""
    target_points: int = 1024
    """Inputs that its Fisher matrix is taken at, independent of these."""
    train: int = 2000
    """Networks for training."""
    valid: int = 500
    """Networks for validation."""
    test: int = 500
    """Networks for testing."""
    seed: int = 0
    """Of everything."""


class Networks(NamedTuple):
    """Networks ``[n, ...]``: their weights as one vector, the inputs whose gradients are given, and the targets."""

    weights: Float[Array, "n P"]
    inputs: Float[Array, "n S"]
    targets: Float[Array, "n P"]


def template(width: int) -> PyTree:
    """Shapes of the parameters of one network."""
    shapes = {"w1": (1, width), "b1": (width,), "w2": (width, width), "b2": (width,), "w3": (width, 1), "b3": (1,)}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def as_tree(weights: Float[Array, "P"], width: int) -> PyTree:
    """One network's parameters, from one vector."""
    leaves, treedef = jax.tree.flatten(template(width))
    pieces = jnp.split(weights, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(treedef, [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves)])


def summed_output(params: PyTree, inputs: Float[Array, "S"]) -> Float[Array, ""]:
    """The sum over the inputs of the network's output: its gradient is that of the output, element by element."""
    h = jnp.sin(inputs[:, None] @ params["w1"] + params["b1"])
    h = jnp.sin(h @ params["w2"] + params["b2"])
    return jnp.sum(h @ params["w3"] + params["b3"])


def structure_of(config: DataConfig) -> gmn_lopt.GradientStructure:
    """The structure of the networks."""
    return gmn_lopt.analyze(summed_output, template(config.width), jax.ShapeDtypeStruct((config.points,), jnp.float32))


def factors_of(weights: Float[Array, "P"], inputs: Float[Array, "S"], width: int) -> gmn_lopt.Factors:
    """The gradients of one network's output, decomposed: factors at the scale of one element."""
    factors: gmn_lopt.Factors = gmn_lopt.value_grad_and_factors(summed_output)(as_tree(weights, width), inputs)[2]
    return factors


def diagonal_of(weights: Float[Array, "P"], inputs: Float[Array, "S"], width: int) -> Float[Array, "P"]:
    """The diagonal of one network's Fisher matrix at some inputs, for a Gaussian likelihood."""
    diagonal = gmn_lopt.fisher_diagonal(summed_output, as_tree(weights, width), inputs)
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(diagonal)])


def draw_inputs(key: Array, p: Float[Array, "n"], count: int) -> Float[Array, "n count"]:
    """Inputs of each network from its mixture: with probability ``p`` from the negative half."""
    side, place = jax.random.uniform(key, (2, len(p), count))
    return jnp.where(side < p[:, None], -place, place)


def make(config: DataConfig, count: int, key: Array) -> Networks:
    """Draw networks, and compute their targets."""
    size = sum(leaf.size for leaf in jax.tree.leaves(template(config.width)))
    keys = jax.random.split(key, 4)
    weights = jax.random.normal(keys[0], (count, size))
    p = jax.random.uniform(keys[1], (count,))
    inputs, others = (draw_inputs(k, p, n) for k, n in zip(keys[2:], (config.points, config.target_points)))

    @jax.jit
    def targets(weights: Array, others: Array) -> Array:
        each = lambda network: diagonal_of(network[0], network[1], config.width)  # noqa: E731
        found: Array = jax.lax.map(each, (weights, others), batch_size=CHUNK)
        return found

    return Networks(weights, inputs, targets(weights, others))


def load(config: DataConfig, cache: Path) -> dict[str, Networks]:
    """The splits, from the cache where they have been made before.

    Raises:
        FileError: in one line, a file of the cache is not what was written.
    """
    name = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:12]
    file = cache / f"curvature-{name}.npz"
    if not file.exists():
        keys = jax.random.split(jax.random.key(config.seed), len(SPLITS))
        made = {split: make(config, getattr(config, split), key) for split, key in zip(SPLITS, keys)}
        cache.mkdir(parents=True, exist_ok=True)
        write_arrays(file, {f"{s}_{f}": np.asarray(x) for s in SPLITS for f, x in made[s]._asdict().items()})
    try:
        arrays = read_arrays(file)
        return {s: Networks(*(jnp.asarray(arrays[f"{s}_{f}"]) for f in Networks._fields)) for s in SPLITS}
    except (FileError, LookupError, TypeError, ValueError) as error:
        raise FileError(f"{file} is damaged; remove it, and it is made again ({first_line(error)})") from None
