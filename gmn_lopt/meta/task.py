"""A task: a model, its data and its loss, on which optimizers are meta-trained and measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.factors.value_and_grad import analyze


@dataclass(frozen=True)
class Task:
    """One training problem, shared by meta-training and evaluation.

    A file ``tasks/NAME.py`` defines a task by a function ``make(data_dir: str | None) -> Task``.

    Attributes:
        name: the task's name, that of its file.
        horizon: number of inner training steps ``T``.
        batch_size: number of examples in one batch.
        loss_cap: losses above it, and losses that are not finite, count as this much; 1.5 times the log of the
            number of classes for a classifier.
        data: the splits ``"train"``, ``"valid"`` (the part of the training split that the inner problem does not train
            on) and ``"test"``, each a pytree of arrays with the examples along the first axis, in the form that
            ``loss`` takes.
        init: draws the parameters from a key.
        loss: ``loss(params, batch)``, the mean loss over the batch, a scalar.
        sample: ``sample(key, split)`` draws a training batch from a split, augmentation included. Traceable.
        test_subset: where ``data["test"]`` is a part of the data set's test split, evenly spaced over it so that
            evaluation stays cheap: what it holds, in words, for reports. Empty where it is the whole.
        at_once: how many test examples the loss is taken on together, where all would take too much memory; None: all.

    Example:
        >>> split = {"x": jnp.ones((8, 3)), "y": jnp.zeros((8, 1))}
        >>> task = Task(
        ...     name="zeros",
        ...     horizon=10,
        ...     batch_size=8,
        ...     loss_cap=10.0,
        ...     data={"train": split, "valid": split, "test": split},
        ...     init=lambda key: {"w": jnp.ones((3, 1))},
        ...     loss=lambda params, batch: jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2),
        ...     sample=lambda key, split: split,
        ... )
        >>> float(task.loss(task.init(jax.random.key(0)), split))
        9.0
    """

    name: str
    horizon: int
    batch_size: int
    loss_cap: float
    data: Mapping[str, PyTree]
    init: Callable[[jax.Array], PyTree]
    loss: Callable[[PyTree, PyTree], Float[Array, ""]]
    sample: Callable[[jax.Array, PyTree], PyTree]
    test_subset: str = ""
    at_once: int | None = None


def evenly_spaced(split: PyTree, count: int) -> PyTree:
    """At most ``count`` examples of a split, evenly spaced over it; always the same."""
    examples = len(jax.tree.leaves(split)[0])
    count = min(count, examples)
    chosen = np.arange(count) * examples // count
    return jax.tree.map(lambda array: array[chosen], split)


def measured_on(task: Task, split: str) -> Task:
    """The task with another of its splits in the place of the test split, a part as large where that is a part."""
    if split == "test":
        return task
    chosen = task.data[split]
    if task.test_subset:
        chosen = evenly_spaced(chosen, len(jax.tree.leaves(task.data["test"])[0]))
    return replace(task, data={**task.data, "test": chosen})


def task_structure(task: Task) -> GradientStructure:
    """Analyse a task's model, on abstract values.

    Raises:
        StructureError: see :func:`gmn_lopt.analyze`.
    """
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = jax.eval_shape(task.sample, jax.random.key(0), task.data["train"])
    return analyze(task.loss, params, batch)
