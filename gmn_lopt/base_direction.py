"""The directions that the learned part of an update is added to: momentum, Adam's, Muon's, or Muon's whitened."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Num, PyTree

from gmn_lopt.matrices import is_kernel, orthogonalize
from gmn_lopt.structure import Parameter
from gmn_lopt.whitening import DECAY as WHITENING_DECAY
from gmn_lopt.whitening import WhitenedLayer, update_covariance, whitened_steps

BASES = ("momentum", "adam", "muon", "whitened")
MUON_DECAY, WHITENED_DECAY, ADAM_DECAY, EPSILON = 0.95, 0.9, 0.999, 1e-8


class MuonState(NamedTuple):
    """State of Muon's direction.

    Attributes:
        step: number of steps taken.
        momentum: shaped like the parameters.
        squares: average squared gradient, of parameters that are no kernels; zeros ``[]`` for kernels.
        covariances: of the activations of each whitened layer, ``[d, d]``; empty for Muon itself.
    """

    step: Int[Array, ""]
    momentum: PyTree
    squares: PyTree
    covariances: tuple[Float[Array, "_ _"], ...]


def init_direction(
    base: str, parameters: Sequence[Parameter], zeros: PyTree, layers: Sequence[WhitenedLayer] = ()
) -> PyTree:
    """The state of a base direction.

    Args:
        base: one of ``BASES``.
        parameters: what the structure says of the leaves, in their order.
        zeros: float32 zeros like the parameters.
        layers: the layers to whiten.
    """
    if base == "momentum":
        return zeros
    if base == "adam":
        return optax.scale_by_adam().init(zeros)
    leaves, treedef = jax.tree.flatten(zeros)
    squares = [jnp.zeros(()) if is_kernel(p) else leaf for p, leaf in zip(parameters, leaves)]
    covariances = tuple(jnp.zeros((layer.size, layer.size)) for layer in layers)
    return MuonState(jnp.zeros((), jnp.int32), zeros, jax.tree.unflatten(treedef, squares), covariances)


def update_direction(
    base: str,
    parameters: Sequence[Parameter],
    phi: PyTree,
    grads: PyTree,
    state: PyTree,
    layers: Sequence[WhitenedLayer] = (),
    activations: Sequence[Num[Array, "_ _"]] = (),
) -> tuple[PyTree, PyTree]:
    """Advance a base direction by one gradient.

    ``"momentum"``: ``v <- mu v + (1 - mu) grad`` with the learned ``mu``. ``"adam"``: optax's Adam, bias-corrected,
    with decays 0.9 and 0.999. ``"muon"`` (Jordan et al. 2024): Nesterov momentum of decay 0.95, orthogonalised for
    kernels; other parameters take Adam's direction from it, times the learned ``gamma``.
    ``"whitened"``: momentum of decay 0.9, and layers take the step of
    :mod:`gmn_lopt.whitening`; what is left is treated as in Muon.

    Args:
        base: one of ``BASES``.
        parameters: what the structure says of the leaves, in their order.
        phi: meta-parameters, of which the coefficients are read.
        grads: float32 gradients.
        state: the state.
        layers: the layers to whiten.
        activations: the factors' activations, for ``layers``; token ids among them are not read.

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
    decay = WHITENED_DECAY if base == "whitened" else MUON_DECAY
    momentum = optax.tree.update_moment(grads, state.momentum, decay, 1)
    ahead, terms = momentum, steps_taken
    if base == "muon":
        ahead, terms = optax.tree.update_moment(grads, momentum, decay, 1), steps_taken + 1.0
    # Bias-corrected by all the weight that momentum (and look-ahead) gives the gradients so far.
    corrected = optax.tree.scale(1.0 / (1.0 - decay**terms), ahead)
    momenta = jax.tree.leaves(corrected)
    whitened: dict[int, Array] = {}
    covariances = []
    for layer, covariance in zip(layers, state.covariances):
        covariances.append(update_covariance(covariance, layer, activations[layer.activation]))
        unbiased = covariances[-1] / (1.0 - WHITENING_DECAY**steps_taken)
        whitened |= dict(whitened_steps(layer, parameters, momenta, unbiased))
    squares, steps, gamma = [], [], jnp.exp(phi["log_gamma"])
    for i, (p, g, m, s) in enumerate(zip(parameters, jax.tree.leaves(grads), momenta, jax.tree.leaves(state.squares))):
        if i in whitened or is_kernel(p):
            steps.append(whitened[i] if i in whitened else orthogonalize(p, m))
            squares.append(s)
        else:
            squares.append(ADAM_DECAY * s + (1 - ADAM_DECAY) * g**2)
            root = jnp.sqrt(squares[-1] / (1.0 - ADAM_DECAY**steps_taken))
            steps.append(gamma * m / (root + EPSILON))
    treedef = jax.tree.structure(grads)
    new_state = MuonState(count, momentum, jax.tree.unflatten(treedef, squares), tuple(covariances))
    return jax.tree.unflatten(treedef, steps), new_state
