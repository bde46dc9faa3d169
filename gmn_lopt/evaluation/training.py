"""Training curves: many runs of one optimizer at once, on the same initialisations and batches as every other one."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gmn_lopt.evaluation.candidate import Candidate, train_step
from gmn_lopt.meta.task import Task


class Curves(NamedTuple):
    """What the runs of one optimizer yield, for ``S`` seeds and ``E`` evaluations.

    The arrays of a grid search carry one more axis in front, over the grid.

    Attributes:
        test_loss: loss on the whole test split after ``eval_every``, ``2 eval_every``, ... steps. Not smoothed.
        train_loss: mean training loss (capped by the task's ``loss_cap``) of the steps since the evaluation before.
        weights: the parameters as one vector, at the initialisation and at each evaluation; ``P = 0`` if not asked for.
    """

    test_loss: Float[np.ndarray, "*grid S E"]
    train_loss: Float[np.ndarray, "*grid S E"]
    weights: Float[np.ndarray, "*grid S E+1 P"]


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of one run, from its seed only: that of the initialisation and that of the batches.

    The batch of step ``t`` is drawn with ``fold_in(batches, t)``, so that every optimizer sees the same batches.
    """
    initialisation, batches = jax.random.split(jax.random.key(seed))
    return initialisation, batches


def training_curves(
    task: Task,
    candidate: Candidate,
    seeds: Sequence[int],
    eval_every: int,
    *,
    grid: bool = False,
    record_weights: bool = False,
    progress: Callable[[int], Any] = lambda steps: None,
) -> Curves:
    """Train on a task from several seeds at once and evaluate along the way.

    All runs are one ``vmap`` in one compiled program, called some twenty times with the state donated, so that
    progress can be shown and an interrupt is heard.

    Args:
        task: the task; its ``horizon`` is the number of steps.
        candidate: the optimizer.
        seeds: one run per seed.
        eval_every: steps between evaluations on the test split; divides the horizon.
        grid: whether the leaves of ``candidate.hyper`` have a leading axis to run over beside the seeds.
        record_weights: whether to keep the parameters at each evaluation.
        progress: called with the number of training steps just finished, counted over all runs.

    Returns:
        The curves; their entries may be infinite or NaN where training diverged.
    """
    evaluations = task.horizon // eval_every
    if evaluations * eval_every != task.horizon:
        raise ValueError(f"eval_every={eval_every} must divide the horizon {task.horizon}")
    # Evaluations in one call: as many calls as evaluations up to twenty, some twenty beyond.
    at_once = max(n for n in range(1, max(1, evaluations // 20) + 1) if evaluations % n == 0)
    plan = _Plan(
        *(task.init, task.loss, task.sample, task.loss_cap, task.at_once, candidate.make, candidate.needs_factors),
        *(eval_every, at_once, grid, record_weights),
    )
    init_keys, batch_keys = (jnp.stack(keys) for keys in zip(*map(run_keys, seeds)))
    runs = len(seeds) * (len(jax.tree.leaves(candidate.hyper)[0]) if grid else 1)

    state = _start(candidate.hyper, init_keys, plan)
    splits = jax.device_put((task.data["train"], task.data["test"]))
    pieces = []
    if record_weights:
        first = _vectors(state[0], len(init_keys.shape) + grid)
    for start in range(0, task.horizon, at_once * eval_every):
        state, piece = _advance(state, candidate.hyper, batch_keys, start, *splits, plan)
        pieces.append(jax.device_get(piece))
        progress(runs * at_once * eval_every)
    test, train, weights = (np.concatenate(parts, axis=1 + grid) for parts in zip(*pieces))
    if record_weights:
        weights = np.concatenate([np.expand_dims(first, 1 + grid), weights], axis=1 + grid)
    else:
        weights = np.zeros((*test.shape[:-1], test.shape[-1] + 1, 0), test.dtype)
    return Curves(test, train, weights)


class _Plan(NamedTuple):
    """What a compiled program is found by."""

    init: Callable[..., Any]
    loss: Callable[..., Any]
    sample: Callable[..., Any]
    cap: float
    examples_at_once: int | None
    make: Callable[..., Any]
    needs_factors: bool
    eval_every: int
    evaluations: int
    grid: bool
    record_weights: bool


def _over_runs(run: Callable[..., Any], grid: bool) -> Callable[..., Any]:
    """``run(state, hyper, key)`` for all seeds and, if asked for, for a grid of hyperparameters in front of them.

    Batches depend on the seed only, so that the ``vmap`` over the grid draws them once.
    """
    over_seeds = jax.vmap(run, in_axes=(0, None, 0))
    return jax.vmap(over_seeds, in_axes=(0, 0, None)) if grid else over_seeds


@partial(jax.jit, static_argnames="plan")
def _start(hyper, keys, plan):
    def run(_, hyper, key):
        params = plan.init(key)
        return params, plan.make(hyper).init(params)

    shape = (len(jax.tree.leaves(hyper)[0]), len(keys)) if plan.grid else (len(keys),)
    return _over_runs(run, plan.grid)(jnp.zeros(shape), hyper, keys)


@partial(jax.jit, static_argnames="plan", donate_argnames="state")
def _advance(state, hyper, keys, start, train, test, plan):
    """Some times ``eval_every`` steps and then one evaluation. The splits are arguments, not constants."""

    def run(state, hyper, key):
        tx = plan.make(hyper)

        def step(carry, t):
            batch = plan.sample(jax.random.fold_in(key, t), train)
            params, opt_state, value = train_step(plan.loss, tx, plan.needs_factors, carry[0], carry[1], batch)
            return (params, opt_state), jnp.where(jnp.isfinite(value), jnp.minimum(value, plan.cap), plan.cap)

        def to_evaluation(carry, first):
            carry, values = jax.lax.scan(step, carry, first + jnp.arange(plan.eval_every))
            weights = _vector(carry[0]) if plan.record_weights else jnp.zeros(0)
            return carry, (mean_loss(plan.loss, carry[0], test, plan.examples_at_once), values.mean(), weights)

        return jax.lax.scan(to_evaluation, state, start + plan.eval_every * jnp.arange(plan.evaluations))

    return _over_runs(run, plan.grid)(state, hyper, keys)


def mean_loss(
    loss: Callable[[PyTree, PyTree], Float[Array, ""]], params: PyTree, split: PyTree, at_once: int | None
) -> Float[Array, ""]:
    """The loss on a split, which is a mean over its examples, taken on some of them after the other.

    Args:
        loss: ``loss(params, examples)``.
        params: the model's parameters.
        split: each leaf ``[examples, ...]``.
        at_once: how many examples at a time, None for all.
    """
    examples = len(jax.tree.leaves(split)[0])
    if at_once is None or at_once >= examples:
        return loss(params, split)
    parts, rest = divmod(examples, at_once)
    whole = examples - rest
    stacked = jax.tree.map(lambda x: x[:whole].reshape(parts, at_once, *x.shape[1:]), split)
    total = at_once * jax.lax.map(lambda part: loss(params, part), stacked).sum()
    if rest:
        total += rest * loss(params, jax.tree.map(lambda x: x[whole:], split))
    return total / examples


def _vector(params: PyTree) -> jax.Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])


def _vectors(params: PyTree, axes: int) -> np.ndarray:
    vectors = _vector
    for _ in range(axes):
        vectors = jax.vmap(vectors)
    return np.asarray(vectors(params))
