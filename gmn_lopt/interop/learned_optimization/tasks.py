"""Their tasks as ours."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval
from jaxtyping import Array, Float, PyTree

from gmn_lopt.interop.learned_optimization import interface
from gmn_lopt.interop.learned_optimization.batches import SPLITS, draw
from gmn_lopt.interop.learned_optimization.named import make
from gmn_lopt.meta.task import Task
from gmn_lopt.util.checks import LONGEST_HORIZON, plain_numbers, shown
from gmn_lopt.util.errors import first_line

RANGES = {"horizon": (1, LONGEST_HORIZON), "batches": (1, 10**6), "seed": (0, 2**31 - 1)}
"""Of the settings that are ours."""


def load_task(place: str, **settings: Any) -> Task:
    """Make a task of what is named.

    Args:
        place: ``learned_optimization:MODULE:NAME``; the name of a ``Task``, a ``TaskFamily``, or what makes one.
        **settings: ``horizon``, ``batches`` and ``seed`` are those of :func:`to_task`, the others go to what is named.

    Raises:
        ValueError: in one line, if it is not there, or no task can be made of it.
    """
    plain_numbers(settings)
    ours = {key: value for key, value in settings.items() if key in RANGES}
    _check_numbers(ours)
    theirs = make(place, {key: value for key, value in settings.items() if key not in RANGES})
    return to_task(theirs, name=place.rpartition(":")[2], **ours)


def to_task(theirs: Any, name: str | None = None, horizon: int = 1000, batches: int = 200, seed: int = 0) -> Task:
    """Make one of our tasks of one of theirs.

    - Data are batches of their iterators, drawn once: a training batch is drawn with replacement from the examples of
      ``batches`` of them, the test loss is the mean of their loss over a tenth as many.
    - Each batch has a key of its own for what their loss draws, such as dropout; those of the test split are fixed.
    - A model state on which the loss does not depend, as that of batch normalisation in training, is what ``init``
      gives. One on which it depends is refused: an inner problem here has parameters only.
    - The largest loss that counts is where their ``normalizer`` cuts, or ten times the loss at the start.

    Args:
        theirs: their ``Task`` or ``TaskFamily``.
        name: the task's name; None: its own.
        horizon: number of inner training steps, which a task of theirs does not have.
        batches: how many to draw from the training split.
        seed: which task of a family.

    Raises:
        ValueError: in one line, if it is neither, its data do not fit, or its loss depends on a model state.

    Example:
        >>> from types import SimpleNamespace
        >>> theirs = SimpleNamespace(  # has the methods of their tasks
        ...     init=lambda key: jax.random.normal(key, (10,)),
        ...     loss=lambda params, key, data: jnp.sum(params**2),
        ...     datasets=None,
        ... )
        >>> task = to_task(theirs, "quadratic", horizon=100)
        >>> batch = task.sample(jax.random.key(0), task.data["train"])
        >>> float(task.loss(jnp.ones(10), batch))
        10.0
    """
    _check_numbers({"horizon": horizon, "batches": batches, "seed": seed})
    if not (interface.is_family(theirs) or interface.is_task(theirs)):
        raise ValueError(
            f"{type(theirs).__name__} is neither a Task (init, loss) nor a TaskFamily (sample, task_fn) of "
            "learned_optimization"
        )
    key = interface.raw_key(jax.random.key(seed))
    name = name or interface.name_of(theirs)
    try:
        chosen = interface.member(theirs, interface.sample(theirs, key))
        datasets = getattr(chosen, "datasets", None) or getattr(theirs, "datasets", None)
        drawn = dict.fromkeys(SPLITS, ()) if datasets is None else draw(datasets, batches)
        examples = [leaf.shape[0] for leaf in jax.tree.leaves(drawn["test"])][:1]
        batch_size = examples[0] // max(1, batches // 10) if examples else 1
        data = {split: _with_keys(split, part, batch_size) for split, part in drawn.items()}
        state = interface.init(chosen, key)[1]
    except ValueError as error:
        raise ValueError(f"{name}: {first_line(error)}") from error
    except Exception as error:  # whatever their code may raise
        raise ValueError(f"{name} fails: {type(error).__name__}: {first_line(error)}") from error

    def init(key: jax.Array) -> PyTree:
        return interface.init(chosen, interface.raw_key(key))[0]

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        return interface.loss(chosen, params, state, jnp.asarray(batch["key"])[0], batch["data"])[0]

    def sample(key: jax.Array, split: PyTree) -> PyTree:
        take, own = jax.random.split(key)
        index = jax.random.randint(take, (batch_size,), 0, split["key"].shape[0])
        batch = jax.tree.map(lambda array: jnp.take(array, index, axis=0), split["data"])
        raw = interface.raw_key(own)
        return {"data": batch, "key": jnp.broadcast_to(raw, (batch_size, *raw.shape))}

    first = jax.tree.map(lambda array: jnp.asarray(array[:batch_size]), data["train"])
    try:
        if _reads_state(chosen, init, state, first):
            raise ValueError(
                "its loss depends on a model state, which the inner problems here do not have; "
                "train it in its own loop, with TruncatedStep"
            )
        cap = _loss_cap(chosen, init, loss, first)
    except Exception as error:  # whatever their code may raise
        raise ValueError(f"{name}: {first_line(error)}") from error
    part = f"{len(data['test']['key'])} examples, as its iterator gives them" if examples else ""
    return Task(name, horizon, batch_size, cap, data, init, loss, sample, part, at_once=batch_size)


def _with_keys(split: str, data: PyTree, batch_size: int) -> PyTree:
    """A split with a key for each example, the same for those of one batch; without data one key."""
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(data)} or {1}
    own = jax.random.fold_in(jax.random.key(0), list(SPLITS).index(split))
    keys = np.asarray(interface.raw_key(jax.random.split(own, max(sizes) // batch_size)))
    return {"data": data, "key": np.repeat(keys, batch_size, axis=0)}


def _reads_state(task: Any, init: Any, state: PyTree, batch: PyTree) -> bool:
    """Whether the loss is computed from the model state."""
    count = len(jax.tree.leaves(state))
    if not count:
        return False
    params = jax.eval_shape(init, jax.random.key(0))
    value = lambda state, params: interface.loss(task, params, state, batch["key"][0], batch["data"])[0]  # noqa: E731
    traced = jax.make_jaxpr(value)(state, params)
    used = partial_eval.dce_jaxpr(traced.jaxpr, [True])[1]
    return any(used[:count])


def _loss_cap(task: Any, init: Any, loss: Any, batch: PyTree) -> float:
    """Where their ``normalizer`` cuts the loss, if that is all that it does."""
    most = float(np.finfo(np.float32).max)
    if hasattr(task, "normalizer"):
        cap = float(task.normalizer(jnp.float32(most)))
        if 0 < cap < most / 4 and math.isclose(float(task.normalizer(jnp.float32(cap / 2))), cap / 2, rel_tol=1e-5):
            return cap
    keys = jax.random.split(jax.random.key(0), 8)
    start = float(np.mean([np.abs(loss(init(key), batch)) for key in keys]))
    if not math.isfinite(start):
        raise ValueError(f"its loss at the start is {start}")
    return 10 * max(start, 1e-6)


def _check_numbers(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        least, most = RANGES[name]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(
                f"{name} must be a whole number of at least {least} and at most {most}, not {shown(value)}"
            )
