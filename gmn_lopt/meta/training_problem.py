"""Training a task with a learned optimizer, as the inner problem of meta-training."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from gmn_lopt.factors.value_and_grad import value_grad_and_extra
from gmn_lopt.meta.task import Task
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer

META_LOSSES = ("train", "validation")
"""The batch the meta-objective is taken on: the one the step trains on, or one of examples it never trains on."""


@runtime_checkable
class Learned(Protocol):
    """What is asked of a learned optimizer, such as :class:`gmn_lopt.LearnedOptimizer`."""

    @property
    def needs_factors(self) -> bool:
        """Whether the optimizer's ``update`` has to be given ``factors``."""
        ...

    def optimizer(self, phi: PyTree) -> optax.GradientTransformationExtraArgs:
        """Turn meta-parameters into an optimizer."""
        ...


class TrainingState(NamedTuple):
    """State of one inner problem: the model's parameters and the optimizer's state."""

    params: PyTree
    optimizer: PyTree


@dataclass(frozen=True)
class TrainingProblem:
    """Training of a task's model by a learned optimizer (an :class:`gmn_lopt.meta.InnerProblem`).

    The ``data`` handed to ``init`` and ``step`` is a mapping with the split ``"train"`` and, for the validation
    meta-loss, ``"valid"``; :meth:`splits` takes them from the task.

    Attributes:
        task: model, loss and sampling.
        lopt: the learned optimizer.
        meta_loss: ``"train"``: the loss that an inner step returns is the training loss before its update.
            ``"validation"``: it is the loss, at the same parameters, on a separate batch of the split ``"valid"``.
        steps: horizon in inner steps, or None for the task's own.

    Example:
        >>> init, loss = lambda key: jnp.ones((3, 1)), lambda w, batch: jnp.mean((batch @ w) ** 2)
        >>> task = Task("zeros", 10, 8, 10.0, {"train": jnp.ones((8, 3))}, init, loss, lambda key, split: split)
        >>> lopt = gmn_lopt.recipe("sgdm", gmn_lopt.analyze(loss, jnp.ones((3, 1)), jnp.ones((8, 3))))
        >>> problem, phi = TrainingProblem(task, lopt), lopt.init(jax.random.key(0))
        >>> state = problem.init(phi, problem.splits(), jax.random.key(1))
        >>> state, loss = problem.step(phi, state, problem.splits(), jax.random.key(2))
        >>> float(loss)
        9.0
    """

    task: Task
    lopt: Learned
    meta_loss: str = "train"
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.meta_loss not in META_LOSSES:
            raise ValueError(f"unknown meta-loss {self.meta_loss!r}; choose one of {', '.join(META_LOSSES)}")

    @property
    def horizon(self) -> int:
        """Number of inner training steps ``T``."""
        return self.task.horizon if self.steps is None else self.steps

    @property
    def loss_cap(self) -> float:
        """Largest loss that counts; the task's."""
        return self.task.loss_cap

    def splits(self) -> dict[str, PyTree]:
        """The splits of the task's data that this problem reads, as JAX arrays."""
        names = ("train", "valid") if self.meta_loss == "validation" else ("train",)
        return {name: jax.tree.map(jnp.asarray, self.task.data[name]) for name in names}

    def optimizer(self, phi: PyTree) -> optax.GradientTransformationExtraArgs:
        """The optimizer, told of the horizon if it wants to know."""
        if isinstance(self.lopt, LearnedOptimizer) and self.lopt.wants_total_steps:
            return self.lopt.optimizer(phi, total_steps=self.horizon)
        return self.lopt.optimizer(phi)

    def init(self, phi: PyTree, data: Any, key: jax.Array) -> PyTree:
        """Draw new parameters of the model; start the optimizer."""
        params = self.task.init(key)
        return TrainingState(params, self.optimizer(phi).init(params))

    def step(self, phi: PyTree, state: PyTree, data: Any, key: jax.Array) -> tuple[PyTree, Float[Array, ""]]:
        """Train on one batch; return the loss that ``meta_loss`` asks for."""
        train_key, valid_key = jax.random.split(key)
        batch = self.task.sample(train_key, data["train"])
        loss, grads, extra = value_grad_and_extra(self.task.loss, self.lopt.needs_factors)(state.params, batch)
        loss = self.reported(loss, state.params, data, valid_key)
        updates, optimizer = self.optimizer(phi).update(grads, state.optimizer, state.params, **extra)
        return TrainingState(optax.apply_updates(state.params, updates), optimizer), loss

    def reported(self, loss: Float[Array, ""], params: PyTree, data: Any, key: jax.Array) -> Float[Array, ""]:
        """The loss that ``meta_loss`` asks for: ``loss``, or that of the model's ``params`` on a validation batch."""
        if self.meta_loss == "train":
            return loss
        return self.task.loss(params, self.task.sample(key, data["valid"]))
