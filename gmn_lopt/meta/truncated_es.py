"""Truncated evolution strategies."""

from dataclasses import dataclass

from jaxtyping import Array, Bool, PyTree

from gmn_lopt.meta.evolution import EvolutionStrategy


@dataclass(frozen=True)
class TruncatedES(EvolutionStrategy):
    """Truncated evolution strategies: less noise, but biased (Vicol et al. 2021, arXiv:2112.13835, algorithm 1).

    Each truncation has a perturbation ``e_t`` of its own, and earlier ones are forgotten: a pair contributes
    ``e_t (L_t+ - L_t-) / (2 sigma^2)``. What the meta-parameters did to the inner state in earlier truncations is not
    seen: the estimate is biased towards short horizons, as :class:`gmn_lopt.meta.Truncated` is.

    Attributes and errors are those of :class:`gmn_lopt.meta.evolution.EvolutionStrategy`.

    Example:
        >>> class Quadratic:  # descent on x^2, where phi is the logarithm of the step size
        ...     horizon, loss_cap = 10, float("inf")
        ...     def init(self, phi, data, key):
        ...         return jax.random.normal(key)
        ...     def step(self, phi, x, data, key):
        ...         x = x - jnp.exp(phi) * 2 * x
        ...         return x, x**2
        >>> estimator, phi = TruncatedES(Quadratic(), pairs=64, truncation=5), jnp.log(0.01)
        >>> state = estimator.init(phi, None, jax.random.key(0))
        >>> state, estimate = jax.jit(estimator.estimate)(phi, state, None, jax.random.key(1))
        >>> bool(estimate.gradient < 0)  # larger steps would lower the loss
        True
    """

    def perturbation(self, fresh: Bool[Array, ""], xi: PyTree, drawn: PyTree) -> tuple[PyTree, PyTree]:
        """Apply and weigh what is drawn."""
        return drawn, drawn
