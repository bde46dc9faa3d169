"""Compare estimators of the meta-gradient, and settings of them, at equal inner steps and at equal time.

python -m bench.estimators --out runs/estimators [--tasks cifar10_mlp] [--only pes nres 'truncated-*']

Every variant in bench/variants.py meta-trains a learned optimizer on every task, from several meta-seeds; what results
is measured against tuned Adam as in eval.py. Writes report.md with a picture for each task, anew after each run.
Interrupt it at any time: a finished run is a file, and the same command goes on with the next one.
"""

import fnmatch
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from bench.estimator_report import write_report
from bench.measure import CLOCKS
from bench.variants import ABLATIONS, ESTIMATORS
from gmn_lopt.cli.command_line import parse
from gmn_lopt.evaluation import protocol
from gmn_lopt.evaluation.candidate import Candidate
from gmn_lopt.evaluation.evaluate import EvaluationConfig, prepare, train
from gmn_lopt.evaluation.results import Results
from gmn_lopt.evaluation.training import training_curves
from gmn_lopt.meta.meta_step import MetaStep
from gmn_lopt.meta.stages import Stage, parse_stage
from gmn_lopt.meta.task import Task, task_structure
from gmn_lopt.meta.training_problem import TrainingProblem
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.tasks import load_task
from gmn_lopt.util.errors import UsageError, first_line
from gmn_lopt.util.hardware import use_all_cores
from gmn_lopt.util.progress import progress
from gmn_lopt.util.threads import one_blas_thread

VARIANTS = ESTIMATORS | ABLATIONS


@dataclass(frozen=True)
class Config:
    """What to compare."""

    out: Path
    """Directory of the results, the report and the pictures."""
    tasks: tuple[str, ...] = ("fashion_mnist_mlp", "cifar10_mlp")
    """Names of files in tasks/, without .py."""
    data_dir: str | None = None
    """Directory of data sets (TensorFlow Datasets' layout); default: its own."""
    only: tuple[str, ...] = tuple(ESTIMATORS)
    """Names of variants, or patterns such as 'truncated-*' or '*'; default: the estimators, without the ablations."""
    pairs: int = 16
    """Pairs (of ``truncated`` unrolls) of a meta-step, where a variant does not say otherwise."""
    learning_rate: float = 1e-3
    """Meta-learning rate, where a variant does not say otherwise."""
    seeds: int = 3
    """Meta-seeds of every variant."""
    eval_seeds: int = 3
    """Seeds (initialisations and batch orders) that a result is evaluated on."""
    inner_steps: int = 1_000_000
    """Inner steps of a run, over all unrolls; decides the number of meta-steps."""
    minutes: float = 5.0
    """Time of a run, without compilation. A run goes on until both budgets are used up, and is measured at both."""
    clock: Literal["wall", "processor"] = "wall"
    """Seconds of the wall clock; or of processor time, summed over cores, for a machine that other work runs on."""
    horizon: int | None = None
    """Inner steps of one inner problem; default: the task's."""


@dataclass(frozen=True)
class Job:
    """A variant on a task: the learned optimizer, the stages with their meta-steps, and what results depend on."""

    name: str
    task: Task
    lopt: LearnedOptimizer
    stages: tuple[Stage, ...]
    fingerprint: str


def make_job(config: Config, task: Task, name: str) -> Job:
    """Make a job of a variant.

    Raises:
        UsageError: in one line, it is not possible on this task.
    """
    variant, lopt = VARIANTS[name], VARIANTS[name].recipe.build(task_structure(task))
    stages, share = [], config.inner_steps / len(variant.stages)
    try:
        for text in variant.stages:
            stage = parse_stage(text, Stage(learning_rate=config.learning_rate, pairs=config.pairs))
            inner_steps = stage.build(TrainingProblem(task, lopt)).inner_steps
            stages.append(replace(stage, meta_steps=math.ceil(share / inner_steps)))
    except ValueError as error:
        raise UsageError(f"variant {name} on {task.name}: {first_line(error)}; leave it out with --only") from None
    return Job(name, task, lopt, tuple(stages), repr(variant))


def meta_train(config: Config, job: Job, seed: int) -> tuple[dict[str, np.ndarray], list[PyTree]]:
    """Meta-train until both budgets are used up, the last stage for as long as it takes.

    A schedule that decays ends where its stage does: then there is nothing to go on with, and the end of the stages is
    also what counts for the time, if there is any left.

    Returns:
        The record (for each meta-step ``inner_steps`` and ``seconds`` since the start, and the ``loss`` of its
        truncations; ``snapshots``, the numbers of meta-steps taken at equal inner steps and at equal time;
        ``compile_seconds``), and the two meta-parameters at the snapshots.
    """
    clock, problem, key = CLOCKS[config.clock], TrainingProblem(job.task, job.lopt), jax.random.key(seed)
    phi = job.lopt.init(jax.random.fold_in(key, 0))
    rows: list[tuple[float, float, float]] = []
    compilation, inner_steps, seconds = 0.0, 0, 0.0
    at_steps = at_time = None
    with progress(config.inner_steps, f"{job.task.name} {job.name} seed {seed}", "inner steps", scale=True) as bar:
        for index, stage in enumerate(job.stages):
            last = index == len(job.stages) - 1
            meta_step = MetaStep(stage.build(problem), stage.meta_optimizer())
            init_key, step_key = jax.random.split(jax.random.fold_in(key, index + 1))
            data, step_key = meta_step.place((problem.splits(), step_key))
            state = meta_step.init(phi, data, init_key)
            begin = clock()
            compiled = meta_step.compile(state, data, step_key)
            compilation += clock() - begin
            number = 0
            while number < stage.meta_steps or (last and stage.schedule == "constant" and at_time is None):
                begin = clock()
                state, metrics = compiled(state, data, step_key, np.uint32(number))
                loss = float(metrics["loss"])  # waits for the device
                seconds += clock() - begin
                inner_steps += meta_step.inner_steps
                number += 1
                rows.append((inner_steps, seconds, loss))
                bar.update(meta_step.inner_steps)
                # The state's memory is used again: a snapshot is a copy on the host.
                if at_time is None and seconds >= 60 * config.minutes:
                    at_time = len(rows), jax.device_get(state.phi)
                if last and number == stage.meta_steps:
                    at_steps = len(rows), jax.device_get(state.phi)
            phi = state.phi
    assert at_steps is not None
    snapshots = [at_steps, at_time or at_steps]
    columns = dict(zip(("inner_steps", "seconds", "loss"), np.array(rows).T))
    counts = {"snapshots": np.array([n for n, _ in snapshots]), "compile_seconds": np.array(compilation)}
    return columns | counts, [phi for _, phi in snapshots]


def evaluate(task: Task, lopt: LearnedOptimizer, phis: Sequence[PyTree], seeds: int) -> dict[str, np.ndarray]:
    """Train the task with several meta-parameters: ``test_loss`` and ``train_loss``, ``[phis, seeds, evaluations]``."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *phis)
    candidate = Candidate("learned", "", "", lopt.optimizer, stacked, lopt.needs_factors)
    curves = training_curves(task, candidate, range(seeds), protocol.default_eval_every(task.horizon), grid=True)
    return {"test_loss": curves.test_loss, "train_loss": curves.train_loss}


def main(config: Config) -> str:
    """Do all runs that are not done, and write the report; returns its text.

    Raises:
        UsageError: in one line, what cannot be done.
    """
    for field in ("learning_rate", "pairs", "seeds", "eval_seeds", "inner_steps", "minutes", "horizon"):
        if (value := getattr(config, field)) is not None and not value > 0:
            raise UsageError(f"--{field.replace('_', '-')} is {value}; it must be positive")
    names = [name for name in VARIANTS if any(fnmatch.fnmatchcase(name, pattern) for pattern in config.only)]
    if not names:
        raise UsageError(f"--only {' '.join(config.only)}: no such variant; there are {', '.join(VARIANTS)}")
    results, jobs, baselines = {}, [], {}
    for name in config.tasks:
        try:
            task = load_task(name, config.data_dir)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise UsageError(f"--tasks {name}: {first_line(error)}") from None
        task = replace(task, horizon=config.horizon or task.horizon)
        kept = ("learning_rate", "pairs", "eval_seeds", "inner_steps", "minutes", "clock")
        settings = {field: getattr(config, field) for field in kept} | {"device": _device()}
        results[name] = Results(config.out / name, settings | {"horizon": task.horizon, "batch_size": task.batch_size})
        jobs += [make_job(config, task, variant) for variant in names]
        baselines[name] = prepare(task, (), config.out / name / "adam", EvaluationConfig(seeds=config.eval_seeds))
    about = (
        f"Meta-learning rate {config.learning_rate:g}, {config.pairs} pairs; budgets: {config.inner_steps:,} inner "
        f"steps and {config.minutes:g} minutes ({config.clock} clock) per run, on {_device()}; {config.seeds} "
        f"meta-seeds, {config.eval_seeds} evaluation seeds."
    )
    found: dict[str, Any] = {name: (p.task.horizon, train(p)[0]._asdict(), {}) for name, p in baselines.items()}
    for seed in range(config.seeds):  # outermost: all variants have a first result before any has a second
        for job in jobs:
            run = results[job.task.name].load(f"{job.name} {seed}", job.fingerprint)
            if run is None:
                run, phis = meta_train(config, job, seed)
                run |= evaluate(job.task, job.lopt, phis, config.eval_seeds)
                run["phi"] = np.stack([ravel_pytree(phi)[0] for phi in phis])
                results[job.task.name].save(f"{job.name} {seed}", job.fingerprint, run)
            found[job.task.name][2].setdefault(job.name, []).append(run)
            written = write_report(config.out, about, found)
    return written


def _device() -> str:
    return f"{jax.local_device_count()} {jax.devices()[0].device_kind}"


def cli(args: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    config = parse(Config, __doc__, args)
    use_all_cores()
    one_blas_thread()
    # The seeds of a variant share their programs, and so does the same command when it goes on.
    jax.config.update("jax_compilation_cache_dir", str(config.out / "compiled"))
    try:
        print(main(config))
    except UsageError as error:
        print(f"bench.estimators: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bench.estimators: interrupted; the same command goes on from what is in {config.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
