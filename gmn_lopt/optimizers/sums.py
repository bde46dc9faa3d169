"""Sums of products of many arrays, by matrix products: a program with a reduction for each shape compiles slowly."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A vector of n entries is a matrix [LANES, n / LANES]; a product with one row is compiled like a reduction.
LANES = 8


def inner_products(x: Sequence[Float[Array, "_ ..."]], y: Sequence[Float[Array, "_ ..."]]) -> Float[Array, " total"]:
    """``<x, y>`` of each pair, for each position of the first axis.

    Example:
        >>> inner_products([jnp.ones((2, 3)), jnp.ones((1, 8, 2))], [jnp.ones((2, 3)), jnp.ones((1, 8, 2))])
        Array([ 3.,  3., 16.], dtype=float32)
    """
    if not x:
        return jnp.zeros(0, jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    products = [jnp.einsum("kln,kmn->klm", _lanes(a), _lanes(b), precision=highest) for a, b in zip(x, y)]
    return jnp.einsum("kll->k", jnp.concatenate(products))


def _lanes(x: Float[Array, "k ..."]) -> Float[Array, "k lanes n"]:
    flat = x.reshape(len(x), -1)
    if missing := -flat.shape[1] % LANES:
        flat = jnp.pad(flat, ((0, 0), (0, missing)))
    return flat.reshape(len(x), LANES, -1)
