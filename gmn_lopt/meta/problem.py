"""What an estimator of the meta-gradient unrolls: any inner problem that depends on meta-parameters."""

from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, PyTree


@runtime_checkable
class InnerProblem(Protocol):
    """An inner problem, unrolled by the estimators of this package.

    Example:
        >>> class Quadratic:  # descent on x^2, where phi is the logarithm of the step size
        ...     horizon, loss_cap = 10, float("inf")
        ...     def init(self, phi, data, key):
        ...         return jax.random.normal(key)
        ...     def step(self, phi, x, data, key):
        ...         x = x - jnp.exp(phi) * 2 * x
        ...         return x, x**2
        >>> isinstance(Quadratic(), InnerProblem)
        True
    """

    @property
    def horizon(self) -> int:
        """Number of steps ``T`` of one inner problem, after which it starts afresh."""
        ...

    @property
    def loss_cap(self) -> float:
        """Losses above it, and losses that are not finite, count as this much. ``math.inf`` for no cap."""
        ...

    def init(self, phi: PyTree, data: Any, key: jax.Array) -> PyTree:
        """Draw the state of a new inner problem."""
        ...

    def step(self, phi: PyTree, state: PyTree, data: Any, key: jax.Array) -> tuple[PyTree, Float[Array, ""]]:
        """Take one step with meta-parameters ``phi``; return the new state and the step's loss (uncapped)."""
        ...
