"""One run of bench/estimators.py: meta-train within a budget, then measure the optimizers that resulted."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clocks import CLOCKS, Clock
from jaxtyping import PyTree

from gmn_lopt import GradMetaNetConfig, LearnedOptimizer
from gmn_lopt.evaluation import protocol
from gmn_lopt.evaluation.candidate import Candidate
from gmn_lopt.evaluation.sources import adam
from gmn_lopt.evaluation.training import training_curves
from gmn_lopt.meta.averaging import averaged
from gmn_lopt.meta.estimator import Estimator
from gmn_lopt.meta.meta_step import MetaStep
from gmn_lopt.meta.stages import Stage, parse_stages
from gmn_lopt.meta.task import Task, task_structure
from gmn_lopt.meta.training_problem import TrainingProblem

RATES_AT_ONCE = 5  # of Adam's grid, each with all seeds


@dataclass(frozen=True)
class Budget:
    """How long to meta-train; the meta-parameters are measured where each of the two is used up.

    Attributes:
        inner_steps: training steps, over all unrolls and stages.
        seconds: time, without compilation.
        clock: the time is its, in seconds.
    """

    inner_steps: int
    seconds: float
    clock: Clock = CLOCKS["wall"]


@dataclass(frozen=True)
class Run:
    """What to meta-train: a variant on a task.

    Attributes:
        lopt: the learned optimizer.
        initial: coefficients to start from, such as ``{"alpha": 2.0}``; those that the rule lacks are passed over.
        stages: the stages with their estimators.
        meta_clip: largest norm of the meta-gradient.
    """

    lopt: LearnedOptimizer
    initial: Mapping[str, float]
    stages: Sequence[tuple[Stage, Estimator]]
    meta_clip: float


@dataclass(frozen=True)
class MakeLearned:
    """Makes the optimizer of meta-parameters; equal architectures are equal, and so share compiled programs."""

    lopt: LearnedOptimizer

    def __call__(self, phi: PyTree) -> Any:
        """The optax transformation."""
        return self.lopt.optimizer(phi)


def make_run(task: Task, settings: Mapping[str, Any], rate: float, pairs: int, inner_steps: int) -> Run:
    """Make a run of settings such as those in a table of ``estimator_variants.py``.

    Raises:
        ValueError: a setting has a value that is not possible on this task.
        TypeError: a setting is not known.
    """
    settings = dict(settings)
    text, meta_clip = settings.pop("stages", "pes"), settings.pop("meta_clip", 1.0)
    initial = settings.pop("initial", {})
    backbone, _, rest = settings.pop("optimizer").partition("+")
    settings = {"backbone": backbone, "gradmetanet": GradMetaNetConfig() if rest else None} | settings
    lopt = LearnedOptimizer(task_structure(task), **settings)
    problem = TrainingProblem(task, lopt)
    stages = parse_stages(text, Stage(learning_rate=rate, pairs=pairs))
    built = []
    for stage in stages:
        estimator = stage.build(problem)
        share = inner_steps / len(stages)
        built.append((replace(stage, meta_steps=math.ceil(share / estimator.inner_steps)), estimator))
    return Run(lopt, initial, built, meta_clip)


def meta_train(
    task: Task, run: Run, seed: int, budget: Budget, progress: Callable[[int], Any]
) -> tuple[dict[str, np.ndarray], list[PyTree]]:
    """Meta-train until both budgets are used up, the last stage for as long as it takes.

    A schedule that decays ends where its stage does: then there is nothing to go on with, and the end of the stages is
    also what counts for the time, if there is any left.

    Returns:
        The record (for each meta-step ``inner_steps`` and ``seconds`` since the start, and the ``loss`` of its windows;
        ``snapshots``, the numbers of meta-steps taken at equal inner steps and at equal time; ``compile_seconds``), and
        the two meta-parameters at the snapshots.
    """
    key = jax.random.key(seed)
    phi = run.lopt.init(jax.random.fold_in(key, 0))
    phi |= {f"log_{n}": jnp.log(jnp.float32(value)) for n, value in run.initial.items() if f"log_{n}" in phi}
    problem = TrainingProblem(task, run.lopt)
    rows: list[tuple[float, float, float]] = []
    compilation, inner_steps, seconds = 0.0, 0, 0.0
    at_time: tuple[int, PyTree] | None = None
    at_steps: tuple[int, PyTree] | None = None
    for index, (stage, estimator) in enumerate(run.stages):
        last = index == len(run.stages) - 1
        meta_step = MetaStep(estimator, stage.meta_optimizer(run.meta_clip))
        init_key, step_key = jax.random.split(jax.random.fold_in(key, index + 1))
        data, step_key = meta_step.place((problem.splits(), step_key))
        state = meta_step.init(phi, data, init_key)
        begin = budget.clock()
        compiled = meta_step.compile(state, data, step_key)
        compilation += budget.clock() - begin
        number = 0
        while number < stage.meta_steps or (last and stage.schedule == "constant" and at_time is None):
            begin = budget.clock()
            state, metrics = compiled(state, data, step_key, np.uint32(number))
            loss = float(metrics["loss"])  # waits for the device
            seconds += budget.clock() - begin
            inner_steps += estimator.inner_steps
            number += 1
            rows.append((inner_steps, seconds, loss))
            progress(estimator.inner_steps)
            # The state's memory is used again: a snapshot is a copy on the host.
            if at_time is None and seconds >= budget.seconds:
                at_time = len(rows), jax.device_get(averaged(state.optimizer, state.phi))
            if last and number == stage.meta_steps:
                at_steps = len(rows), jax.device_get(averaged(state.optimizer, state.phi))
        phi = averaged(state.optimizer, state.phi)
    assert at_steps is not None
    snapshots = [at_steps, at_time or at_steps]
    columns = dict(zip(("inner_steps", "seconds", "loss"), np.array(rows).T))
    counts = {"snapshots": np.array([n for n, _ in snapshots]), "compile_seconds": np.array(compilation)}
    return columns | counts, [phi for _, phi in snapshots]


def evaluate(task: Task, lopt: LearnedOptimizer, phis: Sequence[PyTree], seeds: int) -> dict[str, np.ndarray]:
    """Train the task with several meta-parameters: ``test_loss`` and ``train_loss``, ``[phis, seeds, evaluations]``."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *phis)
    candidate = Candidate("learned", "", "", MakeLearned(lopt), stacked, lopt.needs_factors)
    curves = training_curves(task, candidate, range(seeds), protocol.default_eval_every(task.horizon), grid=True)
    return {"test_loss": curves.test_loss, "train_loss": curves.train_loss}


def evaluate_adam(task: Task, seeds: int) -> dict[str, np.ndarray]:
    """Adam's grid: ``test_loss`` and ``train_loss``, ``[rates, seeds, evaluations]``."""
    parts = []
    for first in range(0, len(protocol.LEARNING_RATES), RATES_AT_ONCE):
        rates = jnp.array(protocol.LEARNING_RATES[first : first + RATES_AT_ONCE])
        every = protocol.default_eval_every(task.horizon)
        parts.append(training_curves(task, Candidate("adam", "", "", adam, rates), range(seeds), every, grid=True))
    return {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("test_loss", "train_loss")}
