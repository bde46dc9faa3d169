"""What is asked of their tasks: the methods that every one of them has, and those that only some have."""

from typing import Any

import jax
from jaxtyping import Array, PyTree


def is_family(theirs: Any) -> bool:
    """Whether it is a ``TaskFamily``: ``sample(key)`` draws what ``task_fn`` makes a task of."""
    return all(callable(getattr(theirs, name, None)) for name in ("sample", "task_fn"))


def is_task(theirs: Any) -> bool:
    """Whether it is a ``Task``: ``init(key)`` and ``loss(params, key, data)``."""
    return all(callable(getattr(theirs, name, None)) for name in ("init", "loss"))


def sample(theirs: Any, key: jax.Array) -> PyTree:
    """What a family makes a task of; of a task nothing."""
    return theirs.sample(key) if is_family(theirs) else None


def member(theirs: Any, sampled: PyTree) -> Any:
    """The task that a family makes of what was sampled; a task itself."""
    return theirs.task_fn(sampled) if is_family(theirs) else theirs


def init(task: Any, key: jax.Array) -> tuple[PyTree, PyTree]:
    """Parameters and model state, None where the task has none."""
    if hasattr(task, "init_with_state"):
        params, state = task.init_with_state(key)
        return params, state
    return task.init(key), None


def loss(task: Any, params: PyTree, state: PyTree, key: jax.Array, data: PyTree) -> tuple[Array, PyTree]:
    """The loss and the new model state."""
    if hasattr(task, "loss_with_state"):
        value, state = task.loss_with_state(params, state, key, data)
        return value, state
    return task.loss(params, key, data), state


def raw_key(key: jax.Array) -> jax.Array:
    """A key as the plain array that their code expects; one that is such an array stays."""
    return jax.random.key_data(key) if jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key) else key


def name_of(theirs: Any) -> str:
    """Its name, or that of its class."""
    try:
        return str(theirs.name)
    except Exception:  # a property that not every class has filled in
        return type(theirs).__name__
