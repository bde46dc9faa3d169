"""The learned schedule of the step size: a power law in time, and a feedback that needs neither task nor horizon.

The step size of a tensor is ``alpha (1 + t / tau)^-power exp(c)``. The power law is ``decay``; ``c`` is ``adapt``, one
for each tensor, and moves by

    ``c <- c + gain (z + overshoot)``,  ``z = cos(-g, u)``, divided by its root mean square, cut to ``[-1, 1]``

where ``u`` is the update that the tensor was given last, and ``g`` the gradient after it. A gradient that would have
gone on as the step before went says that steps are too small; one that would take it back, that they are too large
(hypergradient descent: Baydin et al. 2018, arXiv:1703.04782). Batches are independent, so noise in ``g`` leaves the
mean of the cosine at zero, and since ``z`` has unit size whatever the noise, one ``gain`` does for all models.

Steps that make the most of the next one have ``z`` at zero. Over a longer time larger ones pay (Wu et al. 2018,
arXiv:1803.02021, on this short-horizon bias), hence ``overshoot``, which is positive. Asking for the opposite would not
be safe: where gradients are mostly noise, ``z`` is about zero however small the steps, and they would shrink for ever.
Nor is growing without an end: once a classifier has separated its examples all gradients agree, for any step, until the
steps are so large that everything is lost. So no step size becomes more than ``alpha``: feedback can undo the power
law, and do more than it, but starts from the largest steps that there will be.

A learning rate that the user gives sets the step size alone, without either.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

SQUARE_DECAY, TINY = 0.98, 1e-30


class StepSizeState(NamedTuple):
    """State of the feedback.

    Attributes:
        update: the last update, shaped like the parameters.
        square: for each parameter the moving average of the squared cosine, not corrected for its start.
        log_factor: for each parameter ``c``.
    """

    update: PyTree
    square: PyTree
    log_factor: PyTree


def power_law(phi: PyTree, step: Int[Array, ""]) -> Float[Array, ""]:
    """``(1 + step / tau)^-power``."""
    return (1 + step / jnp.exp(phi["log_tau"])) ** -jnp.exp(phi["log_power"])


def init_step_size(zeros: PyTree) -> StepSizeState:
    """The state before the first step; ``zeros`` are shaped like the parameters."""
    scalars = jax.tree.map(lambda _: jnp.zeros(()), zeros)
    return StepSizeState(zeros, scalars, scalars)


def adapt_step_size(
    phi: PyTree, state: StepSizeState, grads: PyTree, step: Int[Array, ""], scheduled: Float[Array, ""] | float = 1.0
) -> StepSizeState:
    """Advance ``c`` by one gradient; the first step leaves it alone.

    The cosine counts as data: nothing is differentiated through it, but ``c`` has a derivative by its coefficients.

    Args:
        phi: meta-parameters, of which the coefficients are read.
        state: the state, with the last update.
        grads: float32 gradients.
        step: number of steps taken.
        scheduled: what else the step size is multiplied by, such as the power law.
    """
    gain, overshoot = jnp.exp(phi["log_gain"]), jnp.exp(phi["log_overshoot"])
    correction = 1 - SQUARE_DECAY ** jnp.maximum(step, 1).astype(jnp.float32)
    cosines = jax.lax.stop_gradient(jax.tree.map(lambda g, u: -_cosine(g, u), grads, state.update))
    squares = jax.tree.map(lambda s, x: SQUARE_DECAY * s + (1 - SQUARE_DECAY) * x**2, state.square, cosines)

    def moved(c: Array, cosine: Array, square: Array) -> Array:
        z = jnp.clip(cosine * jax.lax.rsqrt(square / correction + TINY), -1.0, 1.0)
        c = c + jnp.where(step == 0, 0.0, gain * (z + overshoot))
        return jnp.minimum(c, -jnp.log(scheduled))

    return state._replace(square=squares, log_factor=jax.tree.map(moved, state.log_factor, cosines, squares))


def _cosine(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The cosine of the angle between two tensors; zero where one of them is zero, or its squares are in float32."""
    return jnp.vdot(a, b) * _inverse_norm(a) * _inverse_norm(b)


def _inverse_norm(a: Float[Array, "*shape"]) -> Float[Array, ""]:
    return jax.lax.rsqrt(jnp.maximum(jnp.vdot(a, a), jnp.finfo(a.dtype).tiny))
