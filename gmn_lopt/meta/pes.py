"""Evolution strategies on truncated unrolls: persistent (PES), with reused noise (NRES), and truncated."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from gmn_lopt.meta.coefficients import is_coefficient
from gmn_lopt.meta.estimator import Estimate
from gmn_lopt.meta.problem import InnerProblem
from gmn_lopt.meta.shaping import SHAPINGS, shape_differences
from gmn_lopt.meta.window import check_window, first_lengths, map_unrolls, standard_error, unroll, window_objective

NOISES = ("persistent", "reused", "truncated")
"""``"persistent"``: PES. A new perturbation for each window; the estimate weighs the sum of those since the episode's
start, and is unbiased. ``"reused"``: noise-reuse evolution strategies (NRES; Li et al. 2023, arXiv:2304.12180). One
perturbation for the whole episode: unbiased too, and the windows of an episode do not add up noise of their own.
``"truncated"``: a new perturbation for each window, and earlier ones are forgotten: less noise, but biased towards
short horizons."""


class PESState(NamedTuple):
    """State of all pairs; every leaf has the pairs as its first axis.

    Attributes:
        inner: inner states; each leaf ``[pairs, 2, ...]``, the positive state of a pair first, then the negative.
        xi: the perturbation that the estimate weighs, accumulated since the start of the episode, or that of the
            episode or of the window; each leaf ``[pairs, *leaf_of_phi.shape]``.
        step: inner steps taken in the current episode; 0 where the next window starts a new one.
        length: length of the current episode in inner steps; the horizon, except for the first (staggered) episodes.
    """

    inner: PyTree
    xi: PyTree
    step: Int[Array, "pairs"]
    length: Int[Array, "pairs"]


@dataclass(frozen=True)
class PES:
    """Antithetic evolution strategies: by default persistent ones (Vicol et al. 2021, arXiv:2112.13835, algorithm 2).

    The contribution of a pair is ``xi (L+ - L-) / (2 sigma^2)``, entry by entry. With persistent and with reused noise
    the estimates of all windows of an episode sum to an unbiased estimate of the gradient of the sum of the windows'
    objectives, smoothed by the perturbations: for ``"mean"`` the mean loss of each window, for ``"final"`` the loss at
    the last step of the horizon, which only the last window sees. An inner problem that has reached its horizon is
    replaced at the start of the next window, with the initial state drawn under the pair's perturbed meta-parameters,
    so that the estimate also covers how the initial state depends on them.

    Attributes:
        problem: the inner problem.
        pairs: number of antithetic pairs of unrolls; both unrolls of a pair see the same problems and batches.
        truncation: inner steps ``K`` in one window; must divide the horizon.
        sigma: standard deviation of the perturbations.
        objective: ``"mean"`` or ``"final"``, see :data:`gmn_lopt.meta.window.OBJECTIVES`.
        noise: how long a perturbation is used and remembered, see :data:`NOISES`.
        coefficient_sigma: standard deviation of the perturbations of the coefficients
            (:func:`gmn_lopt.meta.coefficients.is_coefficient`); 0: ``sigma``.
        shaping: what is done to the pairs' loss differences, see :func:`gmn_lopt.meta.shaping.shape_differences`.
        turns: groups of unrolls taken one after the other, a divisor of their number; see
            :func:`gmn_lopt.meta.window.map_unrolls`.

    Raises:
        ValueError: a count or ``sigma`` is not positive, ``truncation`` does not divide the horizon, or a name is not
            known.
    """

    problem: InnerProblem
    pairs: int = 16
    truncation: int = 50
    sigma: float | int = 0.01
    objective: str = "mean"
    noise: str = "persistent"
    coefficient_sigma: float | int = 0.0
    shaping: str = "none"
    turns: int = 1

    def __post_init__(self) -> None:
        check_window(self.problem, self.truncation, self.objective, pairs=self.pairs, sigma=self.sigma)
        if not self.coefficient_sigma >= 0:
            raise ValueError(f"coefficient_sigma is {self.coefficient_sigma}; it must be positive, or 0 for sigma")
        for name, known in (("noise", NOISES), ("shaping", SHAPINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}")

    @property
    def parallel(self) -> int:
        """Size of the leading axis of every leaf of the state: the number of pairs."""
        return self.pairs

    @property
    def inner_steps(self) -> int:
        """Number of inner steps that one estimate takes, over all unrolls."""
        return 2 * self.pairs * self.truncation

    def init(self, phi: PyTree, data: Any, key: jax.Array) -> PESState:
        """Draw the state of all pairs; see :func:`gmn_lopt.meta.window.first_lengths` for the staggering."""
        inner = jax.vmap(self.problem.init, in_axes=(None, None, 0))(phi, data, jax.random.split(key, self.pairs))
        return PESState(
            inner=jax.tree.map(lambda leaf: jnp.stack([leaf, leaf], axis=1), inner),
            xi=jax.tree.map(lambda leaf: jnp.zeros((self.pairs, *leaf.shape), leaf.dtype), phi),
            step=jnp.zeros(self.pairs, int),
            length=first_lengths(self.problem.horizon, self.truncation, self.pairs),
        )

    def estimate(self, phi: PyTree, state: PESState, data: Any, key: jax.Array) -> tuple[PESState, Estimate]:
        """Unroll one window of every pair; see :class:`gmn_lopt.meta.estimator.Estimator`."""
        noise_key, key = jax.random.split(key)
        # One draw for all leaves: each draw's random bits are a program of their own, which takes a second to compile.
        vector, unravel = ravel_pytree(phi)
        sigma = self._sigma(phi)
        scale = ravel_pytree(jax.tree.map(jnp.full_like, phi, sigma))[0]
        noise = jax.vmap(unravel)(scale * jax.random.normal(noise_key, (self.pairs, vector.size), vector.dtype))
        new_state, differences, losses = map_unrolls(
            lambda noise, state, key: self._window(phi, noise, state, data, key),
            *(self.turns, noise, state, jax.random.split(key, self.pairs)),
        )
        differences = shape_differences(differences, self.shaping)
        weigh = jax.vmap(lambda xi, d: jax.tree.map(lambda x, s: x * (d / (2 * s**2)), xi, sigma))
        contributions = weigh(new_state.xi, differences)
        return new_state, Estimate(
            gradient=jax.tree.map(lambda leaf: leaf.mean(axis=0), contributions),
            loss=losses.mean(),
            noise=standard_error(contributions),
            window_loss=losses,
            window_start=state.step,
        )

    def _sigma(self, phi: PyTree) -> PyTree:
        """The standard deviation of each leaf's perturbations."""
        own = self.coefficient_sigma or self.sigma
        return jax.tree.map(lambda coefficient: own if coefficient else self.sigma, is_coefficient(phi))

    def _window(
        self, phi: PyTree, noise: PyTree, state: PESState, data: Any, key: jax.Array
    ) -> tuple[PESState, Float[Array, ""], Float[Array, ""]]:
        """Unroll one window of one pair; return its state, the difference of its objectives and its mean loss."""
        init_key, window_key = jax.random.split(key)
        fresh = state.step == 0
        if self.noise == "reused":
            noise = xi = optax.tree.where(fresh, noise, state.xi)
        elif self.noise == "truncated":
            xi = noise
        else:
            xi = jax.tree.map(lambda x, e: jnp.where(fresh, e, x + e), state.xi, noise)
        ends_at_horizon = state.step + self.truncation == self.problem.horizon

        def one_sign(sign: Float[Array, ""], inner: PyTree) -> tuple[PyTree, Float[Array, ""], Float[Array, ""]]:
            perturbed = optax.tree.add_scale(phi, sign, noise)
            inner = optax.tree.where(fresh, self.problem.init(perturbed, data, init_key), inner)
            inner, losses = unroll(self.problem, perturbed, inner, data, window_key, self.truncation)
            return inner, window_objective(losses, ends_at_horizon, self.objective), losses.mean()

        inner, objective, losses = jax.vmap(one_sign)(jnp.array([1.0, -1.0]), state.inner)
        # Without a finite cap a diverged unroll has an infinite loss; its pair then tells nothing about the gradient.
        difference = objective[0] - objective[1]
        difference = jnp.where(jnp.isfinite(difference), difference, 0.0)
        step = state.step + self.truncation
        done = step >= state.length
        new_state = PESState(
            inner=inner,
            xi=xi,
            step=jnp.where(done, 0, step),
            length=jnp.where(done, self.problem.horizon, state.length),
        )
        return new_state, difference, losses.mean()
