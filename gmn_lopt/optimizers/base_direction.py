"""The directions that the learned part of an update is added to: momentum, Adam's, Muon's, or a denoised one."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from gmn_lopt.factors.matrices import is_kernel, orthogonalize
from gmn_lopt.factors.structure import Factors, Parameter
from gmn_lopt.optimizers.directions.denoised_layers import (
    LayerGroup,
    activations_and_tangents,
    as_matrices,
    from_matrices,
)
from gmn_lopt.optimizers.directions.denoising import (
    MOMENTUM_DECAY,
    Preconditioner,
    denoised_steps,
    init_preconditioner,
    update_preconditioners,
)

BASES = ("momentum", "adam", "muon", "denoised")
MUON_DECAY, ADAM_DECAY, EPSILON = 0.95, 0.999, 1e-8


class MuonState(NamedTuple):
    """State of Muon's direction and of the denoised one.

    Attributes:
        step: number of steps taken.
        momentum: shaped like the parameters.
        squares: average squared gradient of parameters that take Adam's direction; zeros ``[]`` for others.
        preconditioners: of each group of denoised layers; empty for Muon itself.
    """

    step: Int[Array, ""]
    momentum: PyTree
    squares: PyTree
    preconditioners: tuple[Preconditioner, ...]


def init_direction(
    base: str, parameters: Sequence[Parameter], zeros: PyTree, groups: Sequence[LayerGroup] = ()
) -> PyTree:
    """The state of a base direction.

    Args:
        base: one of ``BASES``.
        parameters: what the structure says of the leaves, in their order.
        zeros: float32 zeros like the parameters.
        groups: the layers to denoise.
    """
    if base == "momentum":
        return zeros
    if base == "adam":
        return optax.scale_by_adam().init(zeros)
    leaves, treedef = jax.tree.flatten(zeros)
    elsewhere = _other_rules(parameters, groups)
    squares = [jnp.zeros(()) if i in elsewhere else leaf for i, leaf in enumerate(leaves)]
    preconditioners = tuple(map(init_preconditioner, groups))
    return MuonState(jnp.zeros((), jnp.int32), zeros, jax.tree.unflatten(treedef, squares), preconditioners)


def _other_rules(parameters: Sequence[Parameter], groups: Sequence[LayerGroup]) -> set[int]:
    """The parameters that do not take Adam's direction: kernels, and those of denoised layers."""
    denoised = {place for group in groups for place in group.places}
    return {i for i, p in enumerate(parameters) if i in denoised or is_kernel(p)}


def update_direction(
    base: str,
    parameters: Sequence[Parameter],
    phi: PyTree,
    grads: PyTree,
    state: PyTree,
    groups: tuple[LayerGroup, ...] = (),
    factors: Factors | None = None,
) -> tuple[PyTree, PyTree]:
    """Advance a base direction by one gradient.

    ``"momentum"``: ``v <- mu v + (1 - mu) grad`` with the learned ``mu``. ``"adam"``: optax's Adam, bias-corrected,
    with decays 0.9 and 0.999. ``"muon"`` (Jordan et al. 2024): Nesterov momentum of decay 0.95, orthogonalised for
    kernels; other parameters take Adam's direction from it, times the learned ``gamma``.
    ``"denoised"``: momentum of decay 0.8, and layers take the step of
    :mod:`gmn_lopt.optimizers.directions.denoising`; what is left is treated as in Muon.

    Args:
        base: one of ``BASES``.
        parameters: what the structure says of the leaves, in their order.
        phi: meta-parameters, of which the coefficients are read.
        grads: float32 gradients.
        state: the state.
        groups: the layers to denoise.
        factors: for ``groups``; float32, the tangents at per-element scale.

    Returns:
        The direction, shaped like the gradients, and the new state.
    """
    if base == "momentum":
        one_minus_mu = jnp.exp(phi["log_one_minus_mu"])
        momentum = jax.tree.map(lambda v, g: v + one_minus_mu * (g - v), state, grads)
        return momentum, momentum
    if base == "adam":
        return optax.scale_by_adam().update(grads, state)
    count = optax.safe_increment(state.step)
    steps_taken = count.astype(jnp.float32)
    decay = MOMENTUM_DECAY if base == "denoised" else MUON_DECAY
    momentum = optax.tree.update_moment(grads, state.momentum, decay, 1)
    ahead, terms = momentum, steps_taken
    if base == "muon":
        ahead, terms = optax.tree.update_moment(grads, momentum, decay, 1), steps_taken + 1.0
    # Bias-corrected by all the weight that momentum (and look-ahead) gives the gradients so far.
    corrected = optax.tree.scale(1.0 / (1.0 - decay**terms), ahead)
    momenta = jax.tree.leaves(corrected)
    preconditioners: tuple[Preconditioner, ...] = ()
    denoised: dict[int, Array] = {}
    if groups:
        assert factors is not None
        sets = [activations_and_tangents(group, parameters, factors) for group in groups]
        matrices = [as_matrices(group, parameters, momenta) for group in groups]
        preconditioners = update_preconditioners(state.preconditioners, groups, sets, matrices, state.step)
        for group, preconditioner, momentum_matrices in zip(groups, preconditioners, matrices):
            denoised |= from_matrices(group, parameters, denoised_steps(group, preconditioner, momentum_matrices))
    elsewhere, gamma = _other_rules(parameters, groups), jnp.exp(phi["log_gamma"])
    squares, steps = [], []
    for i, (p, g, m, s) in enumerate(zip(parameters, jax.tree.leaves(grads), momenta, jax.tree.leaves(state.squares))):
        if i in elsewhere:
            steps.append(denoised[i] if i in denoised else orthogonalize(p, m))
            squares.append(s)
        else:
            squares.append(ADAM_DECAY * s + (1 - ADAM_DECAY) * g**2)
            root = jnp.sqrt(squares[-1] / (1.0 - ADAM_DECAY**steps_taken))
            steps.append(gamma * m / (root + EPSILON))
    treedef = jax.tree.structure(grads)
    new_state = MuonState(count, momentum, jax.tree.unflatten(treedef, squares), preconditioners)
    return jax.tree.unflatten(treedef, steps), new_state
