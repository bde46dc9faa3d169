"""What estimators of the meta-gradient unroll, what they give, and the interface that they share."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree


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


class Estimate(NamedTuple):
    """What one truncation of all unrolls yields.

    Attributes:
        gradient: the estimate of the meta-gradient, shaped like the meta-parameters.
        loss: the mean (capped) loss of the truncation over all unrolls.
        noise: standard error of the estimate: the root of the summed variances of its entries' means over the unrolls.
        truncation_loss: the (capped) mean loss of each pair or unroll over its truncation.
        truncation_start: the inner step at which each pair's or unroll's truncation began.

    Example:
        >>> one = jnp.ones(())
        >>> Estimate({"rate": one}, one, one, truncation_loss=jnp.ones(4), truncation_start=jnp.arange(4)).gradient
        {'rate': Array(1., dtype=float32)}
    """

    gradient: PyTree
    loss: Float[Array, ""]
    noise: Float[Array, ""]
    truncation_loss: Float[Array, "unrolls"]
    truncation_start: Int[Array, "unrolls"]

    @classmethod
    def of(cls, contributions: PyTree, losses: Float[Array, "unrolls"], start: Int[Array, "unrolls"]) -> "Estimate":
        """The mean of what the unrolls (or pairs) contribute, each leaf ``[unrolls, ...]``; one has no noise (NaN)."""
        gradient = jax.tree.map(lambda leaf: leaf.mean(axis=0), contributions)
        noise = jnp.full((), jnp.nan)
        if len(losses) > 1:
            variances = [leaf.var(axis=0, ddof=1).sum() for leaf in jax.tree.leaves(contributions)]
            noise = jnp.sqrt(sum(variances) / len(losses))
        return cls(gradient, losses.mean(), noise, losses, start)


@runtime_checkable
class Estimator(Protocol):
    """Pure functions: ``state = init(phi, data, key)``; ``state, estimate = estimate(phi, state, data, key)``.

    ``data`` is handed to the inner problem as it is. All randomness comes from ``key``: the same arguments give the
    same estimate. Both functions are traceable; the caller compiles them. Every leaf of the state has the unrolls (or
    the pairs of them) as its first axis, so that it can be spread over devices.

    Example:
        >>> class Flat:  # the loss is phi itself
        ...     horizon, loss_cap = 2, 1.0
        ...     def init(self, phi, data, key):
        ...         return ()
        ...     def step(self, phi, state, data, key):
        ...         return state, phi
        >>> estimator, phi, key = gmn_lopt.meta.Truncated(Flat(), truncation=2), jnp.array(0.5), jax.random.key(0)
        >>> state, estimate = estimator.estimate(phi, estimator.init(phi, None, key), None, key)
        >>> isinstance(estimator, Estimator), float(estimate.loss), float(estimate.gradient)
        (True, 0.5, 1.0)
    """

    @property
    def parallel(self) -> int:
        """Size of the first axis of every leaf of the state."""
        ...

    @property
    def inner_steps(self) -> int:
        """Number of inner steps that one estimate takes, over all unrolls."""
        ...

    def init(self, phi: PyTree, data: Any, key: jax.Array) -> PyTree:
        """Draw the inner problems' states, at staggered offsets in their horizon."""
        ...

    def estimate(self, phi: PyTree, state: PyTree, data: Any, key: jax.Array) -> tuple[PyTree, Estimate]:
        """Unroll one truncation of every inner problem and estimate the meta-gradient."""
        ...
