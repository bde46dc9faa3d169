"""The two groups of meta-parameters: the update rule's few coefficients, and the many weights of its networks."""

from typing import Any

import jax
from jaxtyping import PyTree


def is_coefficient(phi: PyTree) -> PyTree:
    """Whether each leaf is a coefficient, such as ``log_alpha``: at the top level, under a key that begins ``log_``.

    A coefficient moves every update at once, so it wants perturbations and meta-learning rates of its own.

    Args:
        phi: meta-parameters, or anything shaped like them.

    Returns:
        A tree of bools, shaped like ``phi``.
    """

    def of(path: tuple[Any, ...], _: Any) -> bool:
        return len(path) == 1 and str(getattr(path[0], "key", "")).startswith("log_")

    return jax.tree.map_with_path(of, phi)


def is_weight(phi: PyTree) -> PyTree:
    """The opposite of :func:`is_coefficient`."""
    return jax.tree.map(lambda coefficient: not coefficient, is_coefficient(phi))
