"""Noise-reuse evolution strategies (NRES)."""

from dataclasses import dataclass

import optax
from jaxtyping import Array, Bool, PyTree

from gmn_lopt.meta.evolution import EvolutionStrategy


@dataclass(frozen=True)
class NRES(EvolutionStrategy):
    """Noise-reuse evolution strategies: unbiased, with less variance (Li et al. 2023, arXiv:2304.12180).

    One perturbation ``e``, drawn where an episode begins, serves all of its truncations: a pair contributes
    ``e (L_t+ - L_t-) / (2 sigma^2)``. The estimates of an episode sum to that of evolution strategies on the whole
    horizon, and do not add up noise of their own.

    Attributes and errors are those of :class:`gmn_lopt.meta.evolution.EvolutionStrategy`.

    Example:
        >>> class Quadratic:  # descent on x^2, where phi is the logarithm of the step size
        ...     horizon, loss_cap = 10, float("inf")
        ...     def init(self, phi, data, key):
        ...         return jax.random.normal(key)
        ...     def step(self, phi, x, data, key):
        ...         x = x - jnp.exp(phi) * 2 * x
        ...         return x, x**2
        >>> estimator, phi = NRES(Quadratic(), pairs=64, truncation=5), jnp.log(0.01)
        >>> state = estimator.init(phi, None, jax.random.key(0))
        >>> state, estimate = jax.jit(estimator.estimate)(phi, state, None, jax.random.key(1))
        >>> bool(estimate.gradient < 0)  # larger steps would lower the loss
        True
    """

    def perturbation(self, fresh: Bool[Array, ""], xi: PyTree, drawn: PyTree) -> tuple[PyTree, PyTree]:
        """Apply and weigh the perturbation of the episode."""
        noise = optax.tree.where(fresh, drawn, xi)
        return noise, noise
