"""Truncated back-propagation through the inner steps: cheap and free of sampling noise, but biased."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from gmn_lopt.meta.estimator import Estimate, InnerProblem
from gmn_lopt.meta.truncation import (
    check_truncation,
    first_lengths,
    map_unrolls,
    next_step,
    unroll,
)


class TruncatedState(NamedTuple):
    """As :class:`gmn_lopt.meta.evolution.EvolutionState`, each leaf of ``inner`` being ``[unrolls, ...]``."""

    inner: PyTree
    step: Int[Array, "unrolls"]
    length: Int[Array, "unrolls"]


@dataclass(frozen=True)
class Truncated:
    """Truncated back-propagation: differentiate each truncation's loss through its ``K`` steps only.

    Inner states persist from truncation to truncation, but what the meta-parameters did to them in earlier ones is not
    differentiated: the estimate is biased towards short horizons (arXiv:2112.13835, section 2). The gradient of each
    unroll is clipped before averaging, since gradients through a long product of Jacobians have heavy tails
    (Metz et al. 2019, arXiv:1810.10180); one that is not finite counts as zero.

    Attributes:
        problem: the inner problem.
        unrolls: number of inner problems unrolled in parallel.
        truncation: inner steps ``K`` in one truncation; must divide the horizon.
        clip: largest global norm of one unroll's gradient.
        objective: ``"mean"`` or ``"final"``, see :data:`gmn_lopt.meta.truncation.OBJECTIVES`.
        remat: recompute each step in the backward pass: memory for ``K`` inner states instead of all intermediate
            values of ``K`` steps. One more forward pass, yet faster on a processor, where memory is what limits.
        turns: groups of unrolls taken one after the other, a divisor of their number; see
            :func:`gmn_lopt.meta.truncation.map_unrolls`.

    Raises:
        ValueError: in one line, a count or ``clip`` is not positive, ``truncation`` does not divide the horizon, or the
            objective is not known.

    Example:
        >>> class Quadratic:  # descent on x^2, where phi is the logarithm of the step size
        ...     horizon, loss_cap = 10, float("inf")
        ...     def init(self, phi, data, key):
        ...         return jax.random.normal(key)
        ...     def step(self, phi, x, data, key):
        ...         x = x - jnp.exp(phi) * 2 * x
        ...         return x, x**2
        >>> estimator, phi = Truncated(Quadratic(), unrolls=8, truncation=5), jnp.log(0.01)
        >>> state = estimator.init(phi, None, jax.random.key(0))
        >>> state, estimate = jax.jit(estimator.estimate)(phi, state, None, jax.random.key(1))
        >>> bool(estimate.gradient < 0)  # larger steps would lower the loss
        True
    """

    problem: InnerProblem
    unrolls: int = 16
    truncation: int = 50
    clip: float | int = 1.0
    objective: str = "mean"
    remat: bool = True
    turns: int = 1

    def __post_init__(self) -> None:
        check_truncation(self.problem, self.truncation, self.objective, unrolls=self.unrolls, clip=self.clip)

    @property
    def parallel(self) -> int:
        """Size of the leading axis of every leaf of the state: the number of unrolls."""
        return self.unrolls

    @property
    def inner_steps(self) -> int:
        """Number of inner steps that one estimate takes, over all unrolls."""
        return self.unrolls * self.truncation

    def init(self, phi: PyTree, data: Any, key: jax.Array) -> TruncatedState:
        """Draw the state of all unrolls; see :func:`gmn_lopt.meta.truncation.first_lengths` for the staggering."""
        keys = jax.random.split(key, self.unrolls)
        return TruncatedState(
            inner=jax.vmap(self.problem.init, in_axes=(None, None, 0))(phi, data, keys),
            step=jnp.zeros(self.unrolls, int),
            length=first_lengths(self.problem.horizon, self.truncation, self.unrolls),
        )

    def estimate(
        self, phi: PyTree, state: TruncatedState, data: Any, key: jax.Array
    ) -> tuple[TruncatedState, Estimate]:
        """Differentiate one truncation of every unroll; see :class:`gmn_lopt.meta.estimator.Estimator`."""
        keys = jax.random.split(key, self.unrolls)
        new_state, gradients, losses = map_unrolls(
            lambda state, key: self._truncation(phi, state, data, key), self.turns, state, keys
        )
        return new_state, Estimate.of(gradients, losses, state.step)

    def _truncation(
        self, phi: PyTree, state: TruncatedState, data: Any, key: jax.Array
    ) -> tuple[TruncatedState, PyTree, Float[Array, ""]]:
        """Differentiate one truncation of one unroll; return its state, its clipped gradient and its mean loss."""

        def loss(phi: PyTree) -> tuple[Float[Array, ""], tuple[PyTree, Float[Array, ""]]]:
            inner, objective, mean_loss = unroll(self, phi, state.inner, state.step, data, key, self.remat)
            return objective, (inner, mean_loss)

        gradient, (inner, mean_loss) = jax.grad(loss, has_aux=True)(phi)
        norm = optax.tree.norm(gradient)
        scale = jnp.minimum(1.0, self.clip / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
        # Selecting, not scaling: zero times NaN is NaN.
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)]).all()
        gradient = jax.tree.map(lambda leaf: jnp.where(finite, scale * leaf, 0.0), gradient)
        step, length = next_step(self.problem, state.step, state.length, self.truncation)
        return TruncatedState(inner, step, length), gradient, mean_loss
