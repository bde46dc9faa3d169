"""Training curves: many runs of one optimizer at once, on the same initialisations and batches as every other one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from gmn_lopt.factors.value_and_grad import value_grad_and_extra
from gmn_lopt.meta.task import Task


@dataclass(frozen=True)
class Candidate:
    """An optax transformation under evaluation and what the evaluation has to know about it.

    Attributes:
        name: its label in the report, unique there.
        source: where it came from, as the user wrote it.
        fingerprint: a digest of everything that determines the optimizer; results are recomputed when it changes.
        make: ``make(hyper)``, the optax transformation. Candidates that share ``make`` share compiled programs.
        hyper: the arrays that ``make`` takes: a learning rate, the meta-parameters of a learned optimizer, or nothing.
        needs_factors: whether ``update`` wants ``factors=``.
        digest: of a learned optimizer, the digest of its meta-parameters alone; else empty.
    """

    name: str
    source: str
    fingerprint: str
    make: Callable[[PyTree], optax.GradientTransformation]
    hyper: PyTree = ()
    needs_factors: bool = False
    digest: str = ""


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


def train_step(
    loss: Callable[[PyTree, PyTree], Float[Array, ""]],
    tx: optax.GradientTransformation,
    needs_factors: bool,
    params: PyTree,
    state: PyTree,
    batch: PyTree,
) -> tuple[PyTree, PyTree, Float[Array, ""]]:
    """Take one training step; returns the new parameters, the new state, and the loss before the step.

    Optimizers that take them get ``value``, ``grad`` and ``value_fn`` too (``optax.polyak_sgd``, ``optax.lbfgs``).
    """
    value, grads, extra = value_grad_and_extra(loss, needs_factors)(params, batch)
    extra |= {"value": value, "grad": grads, "value_fn": lambda p: loss(p, batch)}
    updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state, value


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

    state, first = _start(candidate.hyper, init_keys, plan)
    splits = jax.device_put((task.data["train"], task.data["test"]))
    pieces = []
    for start in range(0, task.horizon, at_once * eval_every):
        state, piece = _advance(state, candidate.hyper, batch_keys, start, *splits, plan)
        pieces.append(jax.device_get(piece))
        progress(runs * at_once * eval_every)
    test, train, weights = (np.concatenate(parts, axis=1 + grid) for parts in zip(*pieces))
    return Curves(test, train, np.concatenate([np.expand_dims(first, 1 + grid), weights], axis=1 + grid))


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


def _weights(params: PyTree, plan: _Plan) -> jax.Array:
    """The parameters as one vector, or none of them."""
    leaves = jax.tree.leaves(params) if plan.record_weights else ()
    return jnp.concatenate([jnp.zeros(0), *map(jnp.ravel, leaves)])


@partial(jax.jit, static_argnames="plan")
def _start(hyper, keys, plan):
    def run(_, hyper, key):
        params = plan.init(key)
        return (params, plan.make(hyper).init(params)), _weights(params, plan)

    return _over_runs(run, plan.grid)(None, hyper, keys)


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
            test_loss = mean_loss(plan.loss, carry[0], test, plan.examples_at_once)
            return carry, (test_loss, values.mean(), _weights(carry[0], plan))

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
