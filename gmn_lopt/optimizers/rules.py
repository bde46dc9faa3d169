"""The update rules: how a direction and the residual make the step of one parameter."""

import abc
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmn_lopt.util.checks import positive

# How much the second output of the network changes the logarithm of the first, in the normalised rule.
MAGNITUDE_SCALE = 0.001
TINY = 1e-30


@dataclass(frozen=True)
class Rule(abc.ABC):
    """How a direction ``v`` and the residual ``beta F`` make a step ``D``; the update is ``-(step size) D``.

    Attributes:
        outputs: number of outputs for each parameter entry that the rule wants of the residual's network.
    """

    outputs: ClassVar[int]

    @abc.abstractmethod
    def step(
        self,
        v: Float[Array, "*shape"],
        outputs: Float[Array, "size outputs"] | None,
        beta: Float[Array, ""] | None,
        sized: bool,
    ) -> Float[Array, "*shape"]:
        """The step of one parameter.

        Args:
            v: the direction.
            outputs: those of the network for the parameter's entries in row-major order; None without a residual.
            beta: the weight of the residual; None without.
            sized: whether the direction has a size of its own (:attr:`Direction.sized`).
        """


@dataclass(frozen=True)
class Additive(Rule):
    """The paper's rule, ``v + beta F`` (arXiv:2507.01649, section 6; Harrison et al. 2022, arXiv:2209.11208).

    Attributes:
        bound: the largest ``beta rms(F) / rms(v)``, per tensor; beyond, ``F`` is scaled down. None: no bound.

    Raises:
        ValueError: ``bound`` is not positive.

    Example:
        >>> Additive().step(jnp.ones(2), jnp.ones((2, 1)), jnp.array(0.5), sized=False)
        Array([1.5, 1.5], dtype=float32)
    """

    bound: float | None = None
    outputs = 1

    def __post_init__(self) -> None:
        if self.bound is not None:
            positive(self, "bound")

    def step(self, v: Array, outputs: Array | None, beta: Array | None, sized: bool) -> Array:
        """``v + beta F``."""
        if outputs is None or beta is None:
            return v
        residual = beta * outputs[:, 0].reshape(v.shape)
        if self.bound is not None:
            residual = jnp.minimum(1.0, self.bound * _rms(v) / _rms(residual)) * residual
        return v + residual


@dataclass(frozen=True)
class Normalized(Rule):
    """``N(v / rms(v) + beta F)``, ``F = direction x exp(0.001 magnitude)``: of a size that the residual has no say in.

    ``N(D) = D / rms(D)``, per tensor, so that only the step size sets it: the rule of Celo2 (Moudgil et al. 2026,
    arXiv:2602.19142) with a direction to start from. Where the direction has a size of its own the step keeps it:
    ``N(D) = rms(v) D / rms(D)``.

    Example:
        >>> Normalized().step(jnp.full(2, 5.0), None, None, sized=False)
        Array([1., 1.], dtype=float32)
    """

    outputs = 2

    def step(self, v: Array, outputs: Array | None, beta: Array | None, sized: bool) -> Array:
        """``N(v / rms(v) + beta F)``."""
        if outputs is None and sized:  # v as it is: nothing to add, and no other size
            return v
        size = _rms(v)
        d = v / size
        if outputs is not None and beta is not None:
            d = d + beta * (outputs[:, 0] * jnp.exp(MAGNITUDE_SCALE * outputs[:, 1])).reshape(v.shape)
        return d / _rms(d) * (size if sized else 1.0)


def _rms(x: jax.Array) -> jax.Array:
    """Root mean square over a tensor."""
    return jnp.sqrt(jnp.mean(x**2) + TINY)
