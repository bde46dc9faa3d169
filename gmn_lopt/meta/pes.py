"""Persistent evolution strategies (PES)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from gmn_lopt.meta.evolution import EvolutionStrategy


@dataclass(frozen=True)
class PES(EvolutionStrategy):
    """Persistent evolution strategies: unbiased (Vicol et al. 2021, arXiv:2112.13835, algorithm 2).

    Each truncation has a perturbation ``e_t`` of its own; the estimate weighs the sum of those since the start of the
    episode, for all of them have shaped the inner state: a pair contributes
    ``(e_1 + ... + e_t) (L_t+ - L_t-) / (2 sigma^2)``. The estimates of all truncations of an episode sum to an unbiased
    estimate of the gradient of the sum of their objectives, smoothed by the perturbations: for ``"mean"`` the mean loss
    of each truncation, for ``"final"`` the loss at the last step of the horizon, which only the last one sees.

    Attributes and errors are those of :class:`gmn_lopt.meta.evolution.EvolutionStrategy`.

    Example:
        >>> class Quadratic:  # descent on x^2, where phi is the logarithm of the step size
        ...     horizon, loss_cap = 10, float("inf")
        ...     def init(self, phi, data, key):
        ...         return jax.random.normal(key)
        ...     def step(self, phi, x, data, key):
        ...         x = x - jnp.exp(phi) * 2 * x
        ...         return x, x**2
        >>> estimator, phi = PES(Quadratic(), pairs=64, truncation=5), jnp.log(0.01)
        >>> state = estimator.init(phi, None, jax.random.key(0))
        >>> state, estimate = jax.jit(estimator.estimate)(phi, state, None, jax.random.key(1))
        >>> bool(estimate.gradient < 0)  # larger steps would lower the loss
        True
    """

    def perturbation(self, fresh: Bool[Array, ""], xi: PyTree, drawn: PyTree) -> tuple[PyTree, PyTree]:
        """Apply what is drawn; weigh the sum since the start of the episode."""
        return drawn, jax.tree.map(lambda x, e: jnp.where(fresh, e, x + e), xi, drawn)
