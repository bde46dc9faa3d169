"""Inner training in their meta-trainers, with factors for the optimizer."""

from dataclasses import dataclass
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gmn_lopt.factors.value_and_grad import value_grad_and_factors
from gmn_lopt.interop.learned_optimization import interface
from gmn_lopt.interop.learned_optimization.optimizers import LearnedOptimizer


@flax.struct.dataclass
class UnrollState:
    """State of one inner problem.

    Attributes:
        inner_opt_state: an ``OptimizerState``: parameters, model state and the optimizer's state.
        inner_step: number of steps of the episode; a scalar, int32, but that ``vmap`` stacks it.
        task_param: what the family makes the task of.
    """

    inner_opt_state: PyTree
    inner_step: Array
    task_param: PyTree


@flax.struct.dataclass
class UnrollOut:
    """What their estimators read of one step, scalars: the fields of their ``TruncatedUnrollOut``.

    Attributes:
        loss: before the step, normalised by the task; 0 where the step begins a new episode.
        is_done: whether it begins a new one.
        task_param: what the family makes the task of.
        iteration: number of steps of the episode, after this one.
        mask: whether the loss counts.
    """

    loss: Any
    is_done: Any
    task_param: PyTree
    iteration: Any
    mask: Any


@dataclass(frozen=True, eq=False)
class TruncatedStep:
    """One inner problem with the methods of learned_optimization's ``TruncatedStep``.

    Theirs calls ``jax.value_and_grad`` and hands the optimizer gradient, loss and model state; this one hands factors
    over, too, where the optimizer reads them. Their ``VectorizedTruncatedStep(step, num_tasks)`` makes many of it,
    which ``TruncatedPES``, ``TruncatedES`` and ``TruncatedGrad`` take. As in theirs, one step goes by for the beginning
    of each new episode. Version 0.0.1, of PyPI, has no such step yet.

    Attributes:
        tasks: their ``Task`` or ``TaskFamily``; of a family, each episode draws a task.
        learned: the optimizer that is meta-trained, for the model of these tasks.
        unroll_length: inner steps of an episode.
        random_initial_iteration_offset: first episodes begin at random with up to as many steps less one behind them,
            so that unrolls are not in step. 0: they are.

    Example:
        >>> from types import SimpleNamespace
        >>> init, loss = lambda key: jax.random.normal(key, (3, 2)), lambda w, key, x: jnp.mean((x @ w) ** 2)
        >>> task = SimpleNamespace(init=init, loss=loss, datasets=None)  # has the methods of their tasks
        >>> x, key = jnp.ones((4, 3)), jax.random.key(0)
        >>> structure = gmn_lopt.analyze(lambda w, x: loss(w, key, x), init(key), x)
        >>> learned = LearnedOptimizer(gmn_lopt.recipe("ds+gmn", structure))
        >>> step = TruncatedStep(task, learned, unroll_length=10)
        >>> theta = step.outer_init(key)
        >>> state, out = step.unroll_step(theta, step.init_step_state(theta, None, key), key, x, None)
        >>> int(out.iteration), bool(out.mask)
        (1, True)
    """

    tasks: Any
    learned: LearnedOptimizer
    unroll_length: int
    random_initial_iteration_offset: int = 0

    def outer_init(self, key: jax.Array) -> PyTree:
        """Draw meta-parameters."""
        return self.learned.init(key)

    def init_step_state(self, theta: PyTree, outer_state: Any, key: jax.Array) -> UnrollState:
        """Draw a task and its parameters; start the optimizer."""
        own, offset = jax.random.split(key)
        state = self._begin(theta, own)
        if not self.random_initial_iteration_offset:
            return state
        step = jax.random.randint(offset, (), 0, self.random_initial_iteration_offset)
        return UnrollState(state.inner_opt_state, step, state.task_param)

    def unroll_step(
        self, theta: PyTree, unroll_state: UnrollState, key: jax.Array, data: PyTree, outer_state: Any
    ) -> tuple[UnrollState, UnrollOut]:
        """Take an inner step on a batch of their data, or begin a new episode after the last step of one."""
        return jax.lax.cond(
            unroll_state.inner_step < self.unroll_length,
            lambda: self._train(theta, unroll_state, key, data),
            lambda: self._reset(theta, unroll_state, key),
        )

    def meta_loss_batch(
        self, theta: PyTree, unroll_state: UnrollState, key: jax.Array, data: PyTree, outer_state: Any
    ) -> Float[Array, ""]:
        """The loss on a batch, normalised by the task, without a step."""
        task = interface.member(self.tasks, unroll_state.task_param)
        params, state = self.learned.opt_fn(theta).get_params_state(unroll_state.inner_opt_state)
        return _normalized(task, interface.loss(task, params, state, key, data)[0])

    def get_batch(self, steps: int | None = None) -> PyTree:
        """Batches of the training split, each leaf ``[steps, ...]``; of a task without data ``()``."""
        return self._batches("train", steps)

    def get_outer_batch(self, steps: int | None = None) -> PyTree:
        """The same of the split for meta-losses."""
        return self._batches("outer_valid", steps)

    def task_name(self) -> str:
        """The name of the task, or of the family."""
        return interface.name_of(self.tasks)

    def cfg_name(self) -> str:
        """The name of the optimizer, for their summaries."""
        return self.learned.name

    def _begin(self, theta: PyTree, key: jax.Array) -> UnrollState:
        sampled_key, init_key, own = jax.random.split(key, 3)
        sampled = interface.sample(self.tasks, sampled_key)
        params, state = interface.init(interface.member(self.tasks, sampled), init_key)
        inner = self.learned.opt_fn(theta, is_training=True).init(params, state, self.unroll_length, own)
        return UnrollState(inner, jnp.zeros((), jnp.int32), sampled)

    def _train(self, theta: PyTree, state: UnrollState, key: jax.Array, data: PyTree) -> tuple[UnrollState, UnrollOut]:
        task, opt = interface.member(self.tasks, state.task_param), self.learned.opt_fn(theta, is_training=True)
        loss_key, own = jax.random.split(key)

        def loss(params: PyTree, state: PyTree, key: jax.Array, data: PyTree) -> tuple[Array, PyTree]:
            return interface.loss(task, params, state, key, data)

        factors = None
        args = *opt.get_params_state(state.inner_opt_state), loss_key, data
        if self.learned.lopt.needs_factors:
            (value, model_state), grad, factors = value_grad_and_factors(loss, has_aux=True)(*args)
        else:
            (value, model_state), grad = jax.value_and_grad(loss, has_aux=True)(*args)
        inner = opt.update(state.inner_opt_state, grad, value, model_state, own, factors)
        step, yes = state.inner_step + 1, jnp.array(True)
        out = UnrollOut(_normalized(task, value), ~yes, state.task_param, step, yes)
        return UnrollState(inner, step, state.task_param), out

    def _reset(self, theta: PyTree, state: UnrollState, key: jax.Array) -> tuple[UnrollState, UnrollOut]:
        new, yes = self._begin(theta, key), jnp.array(True)
        return new, UnrollOut(jnp.zeros(()), yes, state.task_param, new.inner_step, ~yes)

    def _batches(self, split: str, steps: int | None) -> PyTree:
        datasets = getattr(self.tasks, "datasets", None)
        if datasets is None:
            return ()
        iterator = datasets.split(split)
        if steps is None:
            return next(iterator)
        return jax.tree.map(lambda *arrays: np.stack(arrays), *(next(iterator) for _ in range(steps)))


def _normalized(task: Any, loss: Array) -> Float[Array, ""]:
    return jnp.asarray(task.normalizer(loss) if hasattr(task, "normalizer") else loss, jnp.float32)
