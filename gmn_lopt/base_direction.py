"""The directions that the learned part of an update is added to: momentum, Adam's or Muon's."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from gmn_lopt.matrices import is_kernel, orthogonalize
from gmn_lopt.structure import Parameter

BASES = ("momentum", "adam", "muon")
MUON_DECAY, ADAM_DECAY, EPSILON = 0.95, 0.999, 1e-8


class MuonState(NamedTuple):
    """State of Muon's direction.

    Attributes:
        step: number of steps taken.
        momentum: shaped like the parameters.
        squares: average squared gradient, of parameters that are no kernels; zeros ``[]`` for kernels.
    """

    step: Int[Array, ""]
    momentum: PyTree
    squares: PyTree


def init_direction(base: str, parameters: Sequence[Parameter], zeros: PyTree) -> PyTree:
    """The state of a base direction.

    Args:
        base: one of ``BASES``.
        parameters: what the structure says of the leaves, in their order.
        zeros: float32 zeros like the parameters.
    """
    if base == "momentum":
        return zeros
    if base == "adam":
        return optax.scale_by_adam().init(zeros)
    leaves, treedef = jax.tree.flatten(zeros)
    squares = [jnp.zeros(()) if is_kernel(p) else leaf for p, leaf in zip(parameters, leaves)]
    return MuonState(jnp.zeros((), jnp.int32), zeros, jax.tree.unflatten(treedef, squares))


def update_direction(
    base: str, parameters: Sequence[Parameter], phi: PyTree, grads: PyTree, state: PyTree
) -> tuple[PyTree, PyTree]:
    """Advance a base direction by one gradient.

    ``"momentum"``: ``v <- mu v + (1 - mu) grad`` with the learned ``mu``. ``"adam"``: optax's Adam, bias-corrected,
    with decays 0.9 and 0.999. ``"muon"`` (Jordan et al. 2024): Nesterov momentum of decay 0.95, orthogonalised for
    kernels; other parameters take Adam's direction from it, times the learned ``gamma``.

    Args:
        base: one of ``BASES``.
        parameters: what the structure says of the leaves, in their order.
        phi: meta-parameters, of which the coefficients are read.
        grads: float32 gradients.
        state: the state.

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
    momentum = optax.tree.update_moment(grads, state.momentum, MUON_DECAY, 1)
    ahead = optax.tree.update_moment(grads, momentum, MUON_DECAY, 1)
    # Bias-corrected as one average, of the weights that momentum and the look-ahead give the gradients together.
    corrected = optax.tree.scale(1.0 / (1.0 - MUON_DECAY ** (count.astype(jnp.float32) + 1.0)), ahead)
    squares, steps, gamma = [], [], jnp.exp(phi["log_gamma"])
    for p, g, m, s in zip(parameters, *map(jax.tree.leaves, (grads, corrected, state.squares))):
        if is_kernel(p):
            steps.append(orthogonalize(p, m))
            squares.append(s)
        else:
            squares.append(ADAM_DECAY * s + (1 - ADAM_DECAY) * g**2)
            root = jnp.sqrt(squares[-1] / (1.0 - ADAM_DECAY ** count.astype(jnp.float32)))
            steps.append(gamma * m / (root + EPSILON))
    treedef = jax.tree.structure(grads)
    return jax.tree.unflatten(treedef, steps), MuonState(count, momentum, jax.tree.unflatten(treedef, squares))
