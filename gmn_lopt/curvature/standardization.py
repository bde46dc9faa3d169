"""Standardisation of factors by statistics of a training set."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gmn_lopt.factors import Factors

# Means and deviations, each a tree like what is standardised, of one number for each array.
Statistics = dict[str, PyTree]
# A smaller part of an array's size is rounding, not a deviation: what is constant becomes zeros.
SMALLEST = 1e-6


def fit_standardization(values: PyTree) -> Statistics:
    """The mean and the standard deviation of each array of a tree, over all of its entries.

    Of factors, ``[networks, S, d]``, these are one pair for each activation and each tangent, which respects every
    permutation of neurons and of the set (arXiv:2507.01649, appendix G.1, has one pair for each layer).

    Args:
        values: arrays of any shapes, such as the factors of all networks of a training set.

    Returns:
        ``{"mean": ..., "deviation": ...}``, trees like ``values`` with one number for each array; of an array that is
        constant the deviation is 1.

    Example:
        >>> statistics = gmn_lopt.fit_standardization({"a": jnp.array([1.0, 3.0]), "b": jnp.ones(4)})
        >>> {name: float(x) for name, x in statistics["mean"].items()}
        {'a': 2.0, 'b': 1.0}
        >>> {name: float(x) for name, x in statistics["deviation"].items()}
        {'a': 1.0, 'b': 1.0}
    """

    def deviation(x: jax.Array) -> jax.Array:
        found = jnp.std(x)
        return jnp.where(found > SMALLEST * jnp.abs(x).max(), found, 1.0)

    return {"mean": jax.tree.map(jnp.mean, values), "deviation": jax.tree.map(deviation, values)}


def standardize(statistics: Statistics, factors: Factors) -> Factors:
    """Factors less their means, over their deviations, for GradMetaNet without its own normalisation.

    That divides by the size of what it reads, so that the size is lost, which an optimizer wants and a predictor of
    curvature does not.

    Args:
        statistics: what :func:`fit_standardization` found for factors of this model.
        factors: arrays ``[..., S, d]``, the tangents at per-element scale.

    Returns:
        Arrays of the same shapes.

    Example:
        >>> factors = gmn_lopt.Factors((jnp.array([[1.0], [3.0]]),), (jnp.ones((2, 1)),))
        >>> gmn_lopt.standardize(gmn_lopt.fit_standardization(factors), factors).activations[0].ravel()
        Array([-1.,  1.], dtype=float32)
    """
    scale: Callable[..., Any] = lambda x, mean, deviation: (x - mean) / deviation  # noqa: E731
    standardized: Factors = jax.tree.map(scale, factors, statistics["mean"], statistics["deviation"])
    return standardized
