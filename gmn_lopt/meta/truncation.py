"""One truncation of an unrolled inner problem: what all estimators of the meta-gradient are built from."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from gmn_lopt.meta.estimator import InnerProblem

OBJECTIVES = ("mean", "final")
"""``"mean"``: the mean loss along the trajectory. ``"final"``: the loss at the last step of the horizon only."""


def check_truncation(problem: InnerProblem, truncation: int, objective: str, **counts: float | int) -> None:
    """Check what every estimator is configured with.

    Raises:
        ValueError: ``truncation`` does not divide the problem's horizon, the objective is unknown, or one of ``counts``
            is not positive.
    """
    for name, value in {"horizon": problem.horizon, "truncation": truncation, **counts}.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive")
    if problem.horizon % truncation:
        horizon = problem.horizon
        small = [k for k in range(1, math.isqrt(horizon) + 1) if horizon % k == 0]
        divisors = {*small, *(horizon // k for k in small)}
        near = sorted(sorted(divisors, key=lambda k: abs(k - truncation))[:4])
        raise ValueError(
            f"truncation {truncation} does not divide the horizon {problem.horizon}; choose a divisor, such as "
            + ", ".join(map(str, near))
        )
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; choose one of {', '.join(OBJECTIVES)}")


def first_lengths(horizon: int, truncation: int, count: int) -> Int[Array, "count"]:
    """Lengths of the first episodes, in inner steps: multiples of ``truncation``, spread evenly over the horizon.

    All unrolls start from a fresh inner problem, but the first episode of unroll ``i`` ends ``offset_i`` steps early,
    with ``offset_i`` spread over ``[0, horizon)``. From then on the unrolls are staggered, so that every meta-gradient
    mixes early and late training. Unlike a fresh problem whose clock is set forward, a short episode shows the
    optimizer nothing that does not occur in real training.
    """
    truncations = horizon // truncation
    return horizon - truncation * ((jnp.arange(count) * truncations) // count)


def next_step(
    problem: InnerProblem, step: Int[Array, ""], length: Int[Array, ""], truncation: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The step and the length of an unroll's episode after one truncation; step 0 begins a new one, of full length."""
    step = step + truncation
    return jnp.where(step >= length, 0, step), jnp.where(step >= length, problem.horizon, length)


def unroll(
    estimator: Any, phi: PyTree, state: PyTree, start: Int[Array, ""], data: Any, key: jax.Array, remat: bool = False
) -> tuple[PyTree, Float[Array, ""], Float[Array, ""]]:
    """Take the inner steps of one truncation, as one scan, of a new inner problem where an episode begins.

    Args:
        estimator: has the ``problem``, the number of steps ``truncation``, and the ``objective``.
        phi: meta-parameters.
        state: of one inner problem.
        start: step of the episode that the truncation begins at.
        data: handed to the problem.
        key: source of all randomness; the same key gives the same problem and batches for every ``phi``.
        remat: recompute each step in the backward pass, instead of keeping its intermediate values.

    Returns:
        The new state, what the truncation contributes to the objective (to ``"final"`` nothing, unless it ends at the
        horizon), and the mean loss. Losses are capped; one that is not finite counts as the cap.
    """
    problem, (init_key, key) = estimator.problem, jax.random.split(key)

    def step(state: PyTree, key: jax.Array) -> tuple[PyTree, Float[Array, ""]]:
        state, loss = problem.step(phi, state, data, key)
        below = jnp.isfinite(loss) & (loss <= problem.loss_cap)
        return state, jnp.where(below, loss, jnp.asarray(problem.loss_cap, loss.dtype))

    state = optax.tree.where(start == 0, problem.init(phi, data, init_key), state)
    keys = jax.random.split(key, estimator.truncation)
    state, losses = jax.lax.scan(jax.checkpoint(step) if remat else step, state, keys)
    if estimator.objective == "mean":
        return state, losses.mean(), losses.mean()
    at_horizon = start + estimator.truncation == problem.horizon
    return state, jnp.where(at_horizon, losses[-1], jnp.zeros_like(losses[-1])), losses.mean()


def map_unrolls(function: Callable[..., PyTree], turns: int, *args: PyTree) -> PyTree:
    """Apply ``function`` to all unrolls, ``turns`` groups of them one after the other, each group at once.

    ``jax.vmap`` of everything makes stacks of small matrices, whose products are slow on a processor, and arrays that
    leave its cache. The unrolls of a group lie apart by ``turns``, so that each device that holds a part of the leading
    axis takes part in every turn.

    Args:
        function: of one unroll.
        turns: number of groups; must divide the number of unrolls.
        *args: each leaf ``[unrolls, ...]``, as in what is returned.
    """
    if turns == 1:
        return jax.vmap(function)(*args)
    groups = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, turns, *x.shape[1:]), 1, 0), args)
    results = jax.lax.map(lambda group: jax.vmap(function)(*group), groups)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), results)
