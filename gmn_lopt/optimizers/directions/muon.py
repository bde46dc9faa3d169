"""Muon's direction (Jordan et al. 2024): orthogonalised momentum for kernels, Adam's direction for the rest."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from gmn_lopt.factors.matrices import is_kernel, orthogonalize
from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.optimizers.directions.base import Direction
from gmn_lopt.optimizers.leaves import Gradient
from gmn_lopt.util.checks import positive

DECAY, ADAM_DECAY, EPSILON = 0.95, 0.999, 1e-8


class MuonState(NamedTuple):
    """State of Muon's direction.

    Attributes:
        step: number of steps taken.
        momentum: shaped like the parameters.
        squares: average squared gradient of parameters that take Adam's direction; zeros ``[]`` for others.
    """

    step: Int[Array, ""]
    momentum: PyTree
    squares: PyTree


@dataclass(frozen=True)
class OrthogonalDirection(Direction):
    """A direction with a size of its own, whose parameters that are no kernels take Adam's direction, times gamma.

    Attributes:
        gamma: where the coefficient ``gamma`` starts.

    Raises:
        ValueError: ``gamma`` is not positive.
    """

    gamma: float = 0.3
    sized = True

    def __post_init__(self) -> None:
        positive(self, "gamma")

    def coefficients(self) -> dict[str, float]:
        """``gamma``."""
        return {"gamma": self.gamma}

    def treatment(self, structure: GradientStructure) -> list[str]:
        """Muon's or Adam's."""
        return ["Muon's direction" if is_kernel(p) else "Adam's direction" for p in structure.parameters]


@dataclass(frozen=True)
class Muon(OrthogonalDirection):
    """Nesterov momentum of decay 0.95, orthogonalised for kernels; others take Adam's direction from it, times gamma.

    Attributes:
        gamma: where the coefficient ``gamma`` starts.

    Raises:
        ValueError: ``gamma`` is not positive.

    Example:
        >>> Muon().coefficients()
        {'gamma': 0.3}
    """

    def init(self, structure: GradientStructure, indices: Sequence[int], zeros: PyTree) -> MuonState:
        """Zeros."""
        return MuonState(jnp.zeros((), jnp.int32), zeros, init_squares(structure, indices, zeros))

    def update(self, phi: Mapping[str, Array], gradient: Gradient, state: MuonState) -> tuple[PyTree, MuonState]:
        """Advance by one gradient; see :meth:`Direction.update`."""
        count = optax.safe_increment(state.step)
        momentum = optax.tree.update_moment(gradient.grads, state.momentum, DECAY, 1)
        ahead = optax.tree.update_moment(gradient.grads, momentum, DECAY, 1)
        # Bias-corrected by all the weight that momentum and look-ahead give the gradients so far.
        corrected = optax.tree.scale(1.0 / (1.0 - DECAY ** (count.astype(jnp.float32) + 1.0)), ahead)
        direction, squares = muon_steps(phi, gradient, jax.tree.leaves(corrected), state.squares, count)
        return direction, MuonState(count, momentum, squares)


def init_squares(
    structure: GradientStructure, indices: Sequence[int], zeros: PyTree, elsewhere: Collection[int] = ()
) -> PyTree:
    """``zeros`` for the parameters that take Adam's direction, ``[]`` for kernels and for the positions elsewhere."""
    leaves, treedef = jax.tree.flatten(zeros)
    parameters = [structure.parameters[i] for i in indices]
    squares = [
        jnp.zeros((), jnp.float32) if i in elsewhere or is_kernel(p) else jnp.zeros_like(z)
        for i, (p, z) in enumerate(zip(parameters, leaves))
    ]
    return jax.tree.unflatten(treedef, squares)


def muon_steps(
    phi: Mapping[str, Array],
    gradient: Gradient,
    momenta: Sequence[Float[Array, "..."]],
    squares: PyTree,
    count: Int[Array, ""],
    given: Mapping[int, Array] | None = None,
) -> tuple[PyTree, PyTree]:
    """The steps of kernels and of other parameters, from their momenta, which are corrected for their start.

    Args:
        phi, gradient: as for :meth:`Direction.update`.
        momenta: of the leaves.
        squares: the average squared gradients, as :func:`init_squares` began them.
        count: number of steps, this one included.
        given: steps that are known, by position.

    Returns:
        The direction, shaped like the gradients, and the new averages.
    """
    given, gamma = given or {}, jnp.exp(phi["log_gamma"])
    leaves = zip(gradient.parameters, jax.tree.leaves(gradient.grads), momenta, jax.tree.leaves(squares))
    steps, new = [], []
    for i, (p, g, m, s) in enumerate(leaves):
        if i in given or is_kernel(p):
            steps.append(given[i] if i in given else orthogonalize(p, m))
            new.append(s)
        else:
            new.append(ADAM_DECAY * s + (1 - ADAM_DECAY) * g**2)
            root = jnp.sqrt(new[-1] / (1.0 - ADAM_DECAY ** count.astype(jnp.float32)))
            steps.append(gamma * m / (root + EPSILON))
    return gradient.like_grads(steps), gradient.like_grads(new)
