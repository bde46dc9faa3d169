"""The two groups of meta-parameters: the update rule's few coefficients, and the many weights of its networks."""

from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


def is_coefficient(phi: PyTree) -> PyTree:
    """Whether each leaf is a coefficient, such as ``log_alpha``: a scalar under a key that begins ``log_``.

    A coefficient moves every update at once, so it wants perturbations and meta-learning rates of its own.

    Args:
        phi: meta-parameters, or anything shaped like them.

    Returns:
        A tree of bools, shaped like ``phi``.

    Example:
        >>> is_coefficient({"step_size": {"log_alpha": 0.0}, "network": {"bias": 1.0}})
        {'network': {'bias': False}, 'step_size': {'log_alpha': True}}
    """

    def of(path: tuple[Any, ...], leaf: Any) -> bool:
        return bool(path) and np.ndim(leaf) == 0 and str(getattr(path[-1], "key", "")).startswith("log_")

    return jax.tree.map_with_path(of, phi)
