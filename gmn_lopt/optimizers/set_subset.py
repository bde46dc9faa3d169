"""A random subset of the set of gradients, so that large batches and long sequences cost no more than small ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from gmn_lopt.factors.structure import Factors


def subset_size(set_size: int, largest: int | None) -> int:
    """How many elements of a set are read."""
    return set_size if largest is None else min(set_size, largest)


def subset(factors: Factors, largest: int | None, step: Int[Array, ""]) -> Factors:
    """Take a random subset of the set from all factors, the same elements wherever the set is the same.

    Systematic sampling: equally spaced elements from a random offset on, another one at each step. Every element is
    taken equally often, so means over the subset are unbiased estimates of means over the set.

    Args:
        factors: arrays ``[S, d]``.
        largest: the number of elements to take; None: all.
        step: number of steps taken; it determines the offset.
    """

    def take(x: jax.Array) -> jax.Array:
        size = subset_size(len(x), largest)
        if size == len(x):
            return x
        offset = jax.random.randint(jax.random.fold_in(jax.random.key(0), step), (), 0, len(x))
        index = (offset + jnp.arange(size) * len(x) // size) % len(x)
        return jnp.take(x, index, axis=0, mode="clip")

    return jax.tree.map(take, factors)
