"""What the evolution strategies on truncated unrolls share; each is a class of its own (PES, NRES, TruncatedES)."""

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from gmn_lopt.meta.coefficients import is_coefficient
from gmn_lopt.meta.estimator import Estimate, InnerProblem
from gmn_lopt.meta.truncation import (
    check_truncation,
    first_lengths,
    map_unrolls,
    next_step,
    unroll,
)


class EvolutionState(NamedTuple):
    """State of all pairs; every leaf has the pairs as its first axis.

    Attributes:
        inner: inner states; each leaf ``[pairs, 2, ...]``, the positive state of a pair first, then the negative.
        xi: the perturbation that the last estimate weighed; each leaf ``[pairs, *leaf_of_phi.shape]``.
        step: inner steps taken in the current episode; 0 where the next truncation starts a new one.
        length: length of the current episode in inner steps; the horizon, except for the first (staggered) episodes.
    """

    inner: PyTree
    xi: PyTree
    step: Int[Array, "pairs"]
    length: Int[Array, "pairs"]


@dataclass(frozen=True)
class EvolutionStrategy(abc.ABC):
    """Antithetic evolution strategies on truncated unrolls, an :class:`gmn_lopt.meta.Estimator`.

    A pair's two unrolls see the same problem and the same batches, under ``phi + e`` and ``phi - e`` with Gaussian
    ``e``. Its contribution to the estimate is ``xi (L+ - L-) / (2 sigma^2)``, entry by entry, where ``L`` is the
    objective of the truncation and ``xi`` is ``e`` or what earlier truncations have left of theirs: how long an ``e``
    is applied and remembered is what tells the strategies apart (:meth:`perturbation`). An inner problem that has
    reached its horizon is replaced at the start of the next truncation, with the initial state drawn under the pair's
    perturbed meta-parameters, so that the estimate also covers how the initial state depends on them.

    Attributes:
        problem: the inner problem.
        pairs: number of antithetic pairs of unrolls.
        truncation: inner steps ``K`` in one truncation; must divide the horizon.
        sigma: standard deviation of the perturbations.
        objective: ``"mean"`` or ``"final"``, see :data:`gmn_lopt.meta.truncation.OBJECTIVES`.
        coefficient_sigma: standard deviation of the perturbations of the coefficients
            (:func:`gmn_lopt.meta.coefficients.is_coefficient`); None: ``sigma``.
        turns: groups of unrolls taken one after the other, a divisor of their number; see
            :func:`gmn_lopt.meta.truncation.map_unrolls`.

    Raises:
        ValueError: in one line, a count or a ``sigma`` is not positive, ``truncation`` does not divide the horizon, or
            the objective is not known.
    """

    problem: InnerProblem
    pairs: int = 16
    truncation: int = 50
    sigma: float | int = 0.01
    objective: str = "mean"
    coefficient_sigma: float | int | None = None
    turns: int = 1

    def __post_init__(self) -> None:
        own = self.sigma if self.coefficient_sigma is None else self.coefficient_sigma
        positive = {"pairs": self.pairs, "sigma": self.sigma, "coefficient_sigma": own}
        check_truncation(self.problem, self.truncation, self.objective, **positive)

    @abc.abstractmethod
    def perturbation(self, fresh: Bool[Array, ""], xi: PyTree, drawn: PyTree) -> tuple[PyTree, PyTree]:
        """What one pair's meta-parameters are perturbed by in this truncation, and what the estimate weighs.

        Args:
            fresh: whether an episode begins.
            xi: what was weighed in the truncation before.
            drawn: a new perturbation, shaped like the meta-parameters, as is ``xi``.

        Returns:
            ``(e, xi)``.
        """

    @property
    def parallel(self) -> int:
        """Size of the leading axis of every leaf of the state: the number of pairs."""
        return self.pairs

    @property
    def inner_steps(self) -> int:
        """Number of inner steps that one estimate takes, over all unrolls."""
        return 2 * self.pairs * self.truncation

    def init(self, phi: PyTree, data: Any, key: jax.Array) -> EvolutionState:
        """Draw the state of all pairs; see :func:`gmn_lopt.meta.truncation.first_lengths` for the staggering."""
        inner = jax.vmap(self.problem.init, in_axes=(None, None, 0))(phi, data, jax.random.split(key, self.pairs))
        return EvolutionState(
            inner=jax.tree.map(lambda leaf: jnp.stack([leaf, leaf], axis=1), inner),
            xi=jax.tree.map(lambda leaf: jnp.zeros((self.pairs, *leaf.shape), leaf.dtype), phi),
            step=jnp.zeros(self.pairs, int),
            length=first_lengths(self.problem.horizon, self.truncation, self.pairs),
        )

    def estimate(
        self, phi: PyTree, state: EvolutionState, data: Any, key: jax.Array
    ) -> tuple[EvolutionState, Estimate]:
        """Unroll one truncation of every pair; see :class:`gmn_lopt.meta.Estimator`."""
        noise_key, key = jax.random.split(key)
        # One draw for all leaves: each draw's random bits are a program of their own, which takes a second to compile.
        vector, unravel = ravel_pytree(phi)
        own = self.sigma if self.coefficient_sigma is None else self.coefficient_sigma
        sigma = jax.tree.map(lambda coefficient: own if coefficient else self.sigma, is_coefficient(phi))
        scale = ravel_pytree(jax.tree.map(jnp.full_like, phi, sigma))[0]
        drawn = jax.vmap(unravel)(scale * jax.random.normal(noise_key, (self.pairs, vector.size), vector.dtype))
        new_state, differences, losses = map_unrolls(
            lambda drawn, state, key: self._truncation(phi, drawn, state, data, key),
            *(self.turns, drawn, state, jax.random.split(key, self.pairs)),
        )
        weigh = jax.vmap(lambda xi, d: jax.tree.map(lambda x, s: x * (d / (2 * s**2)), xi, sigma))
        contributions = weigh(new_state.xi, differences)
        return new_state, Estimate.of(contributions, losses, state.step)

    def _truncation(
        self, phi: PyTree, drawn: PyTree, state: EvolutionState, data: Any, key: jax.Array
    ) -> tuple[EvolutionState, Float[Array, ""], Float[Array, ""]]:
        """Unroll one truncation of one pair; return its state, the difference of its objectives and its mean loss."""
        noise, xi = self.perturbation(state.step == 0, state.xi, drawn)

        def one_sign(sign: Float[Array, ""], inner: PyTree) -> tuple[PyTree, Float[Array, ""], Float[Array, ""]]:
            return unroll(self, optax.tree.add_scale(phi, sign, noise), inner, state.step, data, key)

        inner, objective, losses = jax.vmap(one_sign)(jnp.array([1.0, -1.0]), state.inner)
        # Without a finite cap a diverged unroll has an infinite loss; its pair then tells nothing about the gradient.
        difference = objective[0] - objective[1]
        difference = jnp.where(jnp.isfinite(difference), difference, 0.0)
        step, length = next_step(self.problem, state.step, state.length, self.truncation)
        return EvolutionState(inner, xi, step, length), difference, losses.mean()
