"""Momentum, the paper's direction (arXiv:2507.01649, section 6)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.optimizers.directions.base import Direction
from gmn_lopt.optimizers.leaves import Gradient
from gmn_lopt.util.checks import fraction


@dataclass(frozen=True)
class Momentum(Direction):
    """``v <- mu v + (1 - mu) gradient`` with a learned ``mu``. Its state is ``v``, shaped like the parameters.

    Attributes:
        decay: where ``mu`` starts; ``1 - mu`` is what is learned.

    Raises:
        ValueError: ``decay`` is not at least 0 and below 1.

    Example:
        >>> Momentum(decay=0.95)
        Momentum(decay=0.95)
    """

    decay: float = 0.9
    sized = False

    def __post_init__(self) -> None:
        fraction(self, "decay")

    def coefficients(self) -> dict[str, float]:
        """``one_minus_mu``."""
        return {"one_minus_mu": 1.0 - self.decay}

    def init(self, structure: GradientStructure, indices: Sequence[int], zeros: PyTree) -> PyTree:
        """Zeros."""
        return zeros

    def update(self, phi: Mapping[str, Array], gradient: Gradient, state: PyTree) -> tuple[PyTree, PyTree]:
        """Advance by one gradient; see :meth:`Direction.update`."""
        # As an increment: 1 - mu is exact, where mu would have lost digits.
        momentum = jax.tree.map(lambda v, g: v + jnp.exp(phi["log_one_minus_mu"]) * (g - v), state, gradient.grads)
        return momentum, momentum
