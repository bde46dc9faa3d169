"""The update rules: how a base direction and the outputs of a backbone make the step of one leaf."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmn_lopt.factors.matrices import is_kernel, orthogonalize
from gmn_lopt.factors.structure import Parameter

RULES = ("additive", "normalized")
# How much an output of one of the backbone's second output changes the logarithm of a step.
MAGNITUDE_SCALE, GATE_SCALE = 0.001, 0.5
TINY = 1e-30


def additive_step(
    v: Float[Array, "*shape"],
    outputs: Float[Array, "size outputs"],
    beta: Float[Array, ""],
    gate: bool,
    bound: float | None,
) -> Float[Array, "*shape"]:
    """``v + beta F`` of one leaf, with its gate and bound (see :class:`gmn_lopt.LearnedOptimizer`).

    Args:
        v: the base direction.
        outputs: the backbone's outputs for the entries of the leaf in row-major order.
        beta: the weight of the backbone's part.
        gate: whether the second output scales ``v``.
        bound: the largest size of the backbone's part relative to ``v``; None: no bound.
    """
    learned = beta * outputs[:, 0].reshape(v.shape)
    if bound is not None:
        learned = jnp.minimum(1.0, bound * _rms(v) / _rms(learned)) * learned
    return (_gated(v, outputs) if gate else v) + learned


def normalized_step(
    parameter: Parameter,
    v: Float[Array, "*shape"],
    outputs: Float[Array, "size outputs"] | None,
    beta: Float[Array, ""] | None,
    gamma: Float[Array, ""] | None,
    gate: bool,
    sized: bool,
) -> Float[Array, "*shape"]:
    """``N(v / rms(v) + beta F)`` of one leaf, with its gate (see :class:`gmn_lopt.LearnedOptimizer`).

    Args:
        parameter: the leaf.
        v: the base direction.
        outputs: the backbone's outputs for the entries of the leaf in row-major order; None without a backbone.
        beta: the weight of the backbone's part; None without a backbone.
        gamma: the size of steps that are not orthogonalised; None where none are orthogonalised (the size is one).
        gate: whether the second output scales the step.
        sized: whether the step has the direction's size, where it is not orthogonalised, instead of one.
    """
    if outputs is None and sized and gamma is None:  # v as it is: nothing to add, and no other size
        return v
    size = _rms(v)
    d = v / size
    if outputs is not None and beta is not None:
        learned = outputs[:, 0] if gate else outputs[:, 0] * jnp.exp(MAGNITUDE_SCALE * outputs[:, 1])
        d = d + beta * learned.reshape(v.shape)
    if gamma is not None and is_kernel(parameter):
        d = orthogonalize(parameter, d)
    else:
        d = d / _rms(d) * (gamma if gamma is not None else size if sized else 1.0)
    return d if outputs is None or not gate else _gated(d, outputs)


def _gated(d: jax.Array, outputs: jax.Array) -> jax.Array:
    return d * jnp.exp(GATE_SCALE * outputs[:, 1]).reshape(d.shape)


def _rms(x: jax.Array) -> jax.Array:
    """Root mean square over a tensor."""
    return jnp.sqrt(jnp.mean(x**2) + TINY)
