"""The denoised direction: layers take the step of :mod:`gmn_lopt.optimizers.directions.denoising`, the rest Muon's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.optimizers.directions.common_factor import comparisons
from gmn_lopt.optimizers.directions.denoised_layers import (
    as_matrices,
    from_matrices,
    layer_groups,
    read_sets,
    why_not_denoised,
)
from gmn_lopt.optimizers.directions.denoising import denoised_steps, update_preconditioners
from gmn_lopt.optimizers.directions.muon import OrthogonalDirection, init_squares, muon_steps
from gmn_lopt.optimizers.directions.preconditioners import MOMENTUM_DECAY, Preconditioner, init_preconditioner
from gmn_lopt.optimizers.directions.spreading import is_large
from gmn_lopt.optimizers.leaves import Gradient


class DenoisedState(NamedTuple):
    """State of the denoised direction: that of Muon's, and of each group of layers of the same sizes the noise."""

    step: Int[Array, ""]
    momentum: PyTree
    squares: PyTree
    preconditioners: tuple[Preconditioner, ...]


@dataclass(frozen=True)
class Denoised(OrthogonalDirection):
    """White activations, and noise taken out of the momentum (of decay 0.8); what is no layer is treated as by Muon.

    The mathematics is in :mod:`gmn_lopt.optimizers.directions.denoising`. It reads the factors.

    Attributes:
        gamma: where ``gamma`` starts, which multiplies Adam's direction of what is neither layer nor kernel.

    Raises:
        ValueError: ``gamma`` is not positive.

    Example:
        >>> Denoised().coefficients()
        {'gamma': 0.3}
    """

    def needs_factors(self, structure: GradientStructure) -> bool:
        """Whether the model has layers at all."""
        return bool(structure.layers)

    def rescaled(self, structure: GradientStructure, indices: Sequence[int]) -> frozenset[int]:
        """The parameters of the layers that take this step."""
        return frozenset(place for group in layer_groups(structure, indices) for place in group.places)

    def treatment(self, structure: GradientStructure) -> list[str]:
        """The denoised step, from the factors, of kernels that are matrices; Muon's or Adam's, and why, of the rest."""
        steps: dict[int, str] = {}
        for group in layer_groups(structure, range(len(structure.parameters))):
            stream = (
                ", orthogonal where activations and tangents are white: a residual stream" if group.residual else ""
            )
            steps |= dict.fromkeys(group.places, "the denoised step, by their factors" + stream)
        others = super().treatment(structure)
        return [
            steps[i] if i in steps else f"{other}: {why_not_denoised(structure, i)}" for i, other in enumerate(others)
        ]

    def init(self, structure: GradientStructure, indices: Sequence[int], zeros: PyTree) -> DenoisedState:
        """Zeros."""
        squares = init_squares(structure, indices, zeros, self.rescaled(structure, indices))
        preconditioners = tuple(map(init_preconditioner, layer_groups(structure, indices)))
        return DenoisedState(jnp.zeros((), jnp.int32), zeros, squares, preconditioners)

    def update(
        self, phi: Mapping[str, Array], gradient: Gradient, state: DenoisedState
    ) -> tuple[PyTree, DenoisedState]:
        """Advance by one gradient; see :meth:`Direction.update`."""
        parameters, groups = gradient.parameters, layer_groups(gradient.structure, gradient.indices)
        count = optax.safe_increment(state.step)
        momentum = optax.tree.update_moment(gradient.grads, state.momentum, MOMENTUM_DECAY, 1)
        corrected = optax.tree.scale(1.0 / (1.0 - MOMENTUM_DECAY ** count.astype(jnp.float32)), momentum)
        momenta, preconditioners = jax.tree.leaves(corrected), state.preconditioners
        denoised: dict[int, Array] = {}
        if groups:
            assert gradient.factors is not None
            sets = [read_sets(group, gradient.factors) for group in groups]
            matrices = [as_matrices(group, parameters, momenta) for group in groups]
            preconditioners = update_preconditioners(
                state.preconditioners,
                groups,
                sets,
                matrices,
                state.step,
                comparisons(groups, gradient, is_large(groups)),
            )
            for group, steps in zip(groups, denoised_steps(groups, preconditioners, matrices)):
                denoised |= from_matrices(group, parameters, steps)
        direction, squares = muon_steps(phi, gradient, momenta, state.squares, count, denoised)
        return direction, DenoisedState(count, momentum, squares, preconditioners)
