"""The weights of the networks: LeCun-normal matrices and vectors of zeros, drawn in one go."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

# The standard deviation of a standard normal variable truncated to [-2, 2].
_TRUNCATED_STD = 0.87962566103423978


def matrix(module: nn.Module, name: str, rows: int, columns: int) -> jax.Array:
    """A LeCun-normal matrix among a module's parameters."""
    return module.param(name, nn.initializers.lecun_normal(), (rows, columns), jnp.float32)


def vector(module: nn.Module, name: str, size: int) -> jax.Array:
    """A vector of zeros among a module's parameters."""
    return module.param(name, nn.initializers.zeros, (size,), jnp.float32)


def init_weights(init: Callable[..., Any], key: jax.Array, *args: Any) -> PyTree:
    """Draw what ``init(key, *args)["params"]`` of a flax module would: LeCun-normal matrices and zero vectors.

    Flax draws each weight with its own random bits and by running the module, whose compilation takes seconds for
    GradMetaNet. This draws all of them from one array and only traces the module for its shapes.

    Args:
        init: the ``init`` of a module all of whose matrices are LeCun-normal and all of whose vectors are zero.
        key: a random key.
        *args: arguments of the module, of which only shapes and dtypes matter.

    Returns:
        The module's parameters.

    Example:
        >>> dense = nn.Dense(2)
        >>> jax.tree.map(jnp.shape, init_weights(dense.init, jax.random.key(0), jnp.ones((1, 3))))
        {'bias': (2,), 'kernel': (3, 2)}
    """
    shapes = jax.eval_shape(init, key, *args)["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    sizes = [leaf.size for leaf in leaves]
    flat = jax.random.truncated_normal(key, -2.0, 2.0, (sum(sizes),), jnp.float32) / _TRUNCATED_STD
    pieces = jnp.split(flat, np.cumsum(sizes)[:-1])
    drawn = [
        piece.reshape(leaf.shape) / math.sqrt(leaf.shape[0]) if leaf.ndim == 2 else jnp.zeros(leaf.shape, jnp.float32)
        for piece, leaf in zip(pieces, leaves)
    ]
    return jax.tree.unflatten(treedef, drawn)
