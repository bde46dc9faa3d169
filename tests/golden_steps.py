"""Recorded training steps, and what is kept of the updates that optimizers make of them (tests/golden/)."""

import functools
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optimizing
import transformers

import gmn_lopt

FILE = Path(__file__).parent / "golden" / "updates.npz"
STEPS, PROJECTIONS = 20, 3

MODELS = {
    "mlp": lambda: optimizing.mlp(7, 6, 8, 5),
    "transformer": transformers.plain,
    "scanned stack": functools.partial(transformers.plain, scan=True, blocks=3),
}


@functools.cache
def steps(name):
    """The structure of a model, and parameters, gradients and factors of twenty steps, drawn at random.

    They come from NumPy alone: what a compiler rounds otherwise must not be what the updates differ by.
    """
    loss, params, args = MODELS[name]()
    structure = gmn_lopt.analyze(loss, params, *args)
    rng, recorded = np.random.default_rng(0), []

    def normal(shape, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    constant = jax.tree.map(lambda p: normal(p.shape), params)
    for _ in range(STEPS):
        grads = jax.tree.map(lambda c: 0.1 * (c + normal(c.shape)), constant)
        activations = tuple(
            jnp.asarray(rng.integers(0, transformers.VOCABULARY, shape)) if i in structure.token_ids else normal(shape)
            for i, shape in enumerate(structure.activation_shapes)
        )
        tangents = tuple(normal(shape, 1 / shape[0]) for shape in structure.tangent_shapes)
        recorded.append((params, grads, gmn_lopt.Factors(activations, tangents)))
        params = jax.tree.map(lambda p: p + normal(p.shape, 0.01), params)
    return structure, recorded


def draw(name, shape):
    """Weights of a network, which depend on their name and shape alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    scale = 1 / np.sqrt(shape[0]) if len(shape) > 1 else 0.2
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


def summarise(tx, recorded):
    """Of each step and each leaf of its update: the root mean square, and products with fixed random directions."""
    state, found = tx.init(recorded[0][0]), []
    update = jax.jit(tx.update)
    for params, grads, factors in recorded:
        updates, state = update(grads, state, params, factors=factors)
        leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(updates)]
        directions = [np.random.default_rng(i).normal(size=(PROJECTIONS, leaf.size)) for i, leaf in enumerate(leaves)]
        rows = [(np.sqrt(np.mean(u**2)), *(d @ u / np.sqrt(u.size))) for u, d in zip(leaves, directions)]
        found.append(np.asarray(rows))
    return np.asarray(found, np.float32)
