"""Meta-train a learned optimizer on a task.

python meta_train.py --task digits_mlp --optimizer ds+gmn --out runs/digits

Interrupt it at any time (Ctrl-C or SIGTERM: it finishes the meta-step, saves and exits with code 0) and continue with
python meta_train.py --out runs/digits --resume

Several processes, on one machine or on many, compute one run together: one command each, with --coordinator HOST:PORT
--processes N --process-id I. See README.md.

The defaults are those of --preset best: what docs/meta_training.md found to learn fastest, a matter of minutes.
--preset paper is the paper's protocol: one stage of PES, 16 pairs, windows of 50 steps, Adam at 1e-4 for 50,000
meta-steps. Flags change single settings of either.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from tqdm import tqdm

from gmn_lopt.meta.augmentation import AugmentedProblem
from gmn_lopt.meta.averaging import averaged
from gmn_lopt.meta.config import (
    FREE,
    INITIAL_COEFFICIENTS,
    OPTIMIZERS,
    Config,
    UsageError,
    from_command_line,
    make_stages,
    to_json,
)
from gmn_lopt.meta.meta_step import MetaStep
from gmn_lopt.meta.mixture import MixedMetaStep, MixtureProblem
from gmn_lopt.meta.processes import Processes, ProcessesError, connected
from gmn_lopt.meta.run_directory import RunDirectory, RunError
from gmn_lopt.meta.sharding import unroll_shardings
from gmn_lopt.meta.shared_run import SharedRunDirectory
from gmn_lopt.meta.stages import Stage
from gmn_lopt.meta.stop_signal import StopSignal
from gmn_lopt.meta.task import Task, task_structure
from gmn_lopt.meta.training_problem import TrainingProblem
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.optimizers.saved import SerializationError, load_learned, save
from gmn_lopt.tasks import load_task
from gmn_lopt.tasks.mixture import make_all
from gmn_lopt.util.errors import first_line
from gmn_lopt.util.hardware import describe_hardware

ATTENTION_HEADS = 4  # of gmn++, where --gmn.attention-heads does not say
MIXTURE = "mixture"
# Settings of the learned optimizer that the configuration has under the same name.
ARCHITECTURE = [
    "base",
    "width",
    "hidden_layers",
    "rule",
    "orthogonalize",
    "gate",
    "decay",
    "adapt",
    "bound",
    "learning_rate",
    "output_scale",
]
RUN_AHEAD = 4  # meta-steps that may be in flight on the device before the host waits


def main(config: Config) -> bool:
    """Meta-train; show progress on stderr.

    Returns:
        True when the run is complete, False when a signal ended it early (continue with ``resume=True``).

    Raises:
        UsageError, RunError, ProcessesError: in one line, what cannot be done.
    """
    stop = StopSignal()
    with stop.listen(), connected(config.coordinator, config.processes, config.process_id) as processes:
        stages = make_stages(config)
        lopt, problem = make_problem(config)
        if not config.resume:
            read_start(config, lopt)  # so that a wrong one is refused before there is a run directory
        try:
            meta_steps = [stage.meta_step(problem, config.meta_clip) for stage in stages]
            for meta_step in meta_steps:
                unroll_shardings(meta_step.parallel)
        except ValueError as error:
            raise UsageError(str(error)) from None
        run = open_run(config, processes)
        try:
            if run.complete:
                if processes.first:
                    print(f"{config.out} is complete: {sum(stage.meta_steps for stage in stages)} meta-steps")
                return True
            return train(config, run, lopt, problem, list(zip(stages, meta_steps)), stop, processes)
        finally:
            run.close()


def make_problem(config: Config) -> tuple[LearnedOptimizer, TrainingProblem | MixtureProblem]:
    """The learned optimizer, and the training of the task, or of all tasks of the mixture, with it."""
    if config.optimizer not in OPTIMIZERS:
        raise UsageError(f"unknown --optimizer {config.optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")
    try:
        if config.task != MIXTURE:
            task = load_task(config.task, config.data_dir)
            lopt = make_lopt(config, task)
            return lopt, TrainingProblem(task, lopt, config.meta_loss, config.horizon)
        tasks = make_all(config.data_dir)
        lopts = [make_lopt(config, task) for task in tasks]
        if len({lopt.tied_leaves for lopt in lopts}) > 1:
            raise ValueError("unf belongs to one model, but the tasks have several; train ds or ds+gmn on all of them")
        parts = [TrainingProblem(t, lopt, config.meta_loss, config.horizon) for t, lopt in zip(tasks, lopts)]
        # A task's cap is 1.5 times the loss of knowing nothing: relative to it, all tasks count alike.
        weights = tuple(1.5 / task.loss_cap for task in tasks)
        augmented = tuple(AugmentedProblem(part, rate_range=config.rate_range) for part in parts)
        return lopts[0], MixtureProblem(augmented, weights)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise UsageError(f"--task {config.task}: {first_line(error)}") from error


def make_lopt(config: Config, task: Task) -> LearnedOptimizer:
    """The learned optimizer for a task's model."""
    backbone, _, rest = config.optimizer.partition("+")
    gmn = config.gmn
    if rest == "gmn++" and not gmn.attention_heads:
        gmn = dataclasses.replace(gmn, attention_heads=ATTENTION_HEADS)
    return LearnedOptimizer(
        structure=task_structure(task),
        backbone=backbone,
        gradmetanet=gmn if rest else None,
        **{name: getattr(config, name) for name in ARCHITECTURE},
    )


def open_run(config: Config, processes: Processes) -> RunDirectory | SharedRunDirectory:
    """Open or begin the run in ``config.out``."""
    packages = ("gmn_lopt", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}
    versions["hardware"] = describe_hardware()
    settings = to_json(config)
    keep_period = config.keep_every * config.checkpoint_every

    def begin() -> RunDirectory:
        return RunDirectory(config.out, settings, versions, config.resume, FREE, config.keep, keep_period)

    if processes.count == 1:
        return begin()
    local = ("out", "data_dir", "resume")
    processes.check_same(json.dumps({name: value for name, value in settings.items() if name not in local}))
    return SharedRunDirectory(config.out, processes, begin)


def train(
    config: Config,
    run: RunDirectory | SharedRunDirectory,
    lopt: LearnedOptimizer,
    problem: TrainingProblem | MixtureProblem,
    stages: Sequence[tuple[Stage, MetaStep | MixedMetaStep]],
    stop: StopSignal,
    processes: Processes,
) -> bool:
    """Go through the stages, from the latest checkpoint on; return whether all are done."""
    key = jax.random.key(config.seed)
    phi = initial_phi(config, lopt, jax.random.fold_in(key, 0), run.latest == 0)
    total = sum(stage.meta_steps for stage, _ in stages)
    weights = sum(leaf.size for leaf in jax.tree.leaves(phi))
    if processes.first:
        print(
            f"{config.optimizer} on {config.task}: {weights} meta-parameters, {total} meta-steps, horizon "
            f"{problem.horizon}, {jax.device_count()} {jax.default_backend()} device(s), run directory {run.path}",
            file=sys.stderr,
        )
    if processes.first and run.latest == 0 and len(stages) > 1:
        save_optimizer(run.path / "stages" / "0-start", lopt, phi)
    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        initial=run.latest,
        mininterval=0.2 if terminal else 10,
        dynamic_ncols=terminal,
        disable=not processes.first,
    ) as bar:
        begin = 0
        for index, (stage, meta_step) in enumerate(stages):
            name, end = f"{index + 1}-{stage.estimator}", begin + stage.meta_steps
            if run.latest > end:
                begin = end
                continue
            bar.set_description(f"{name}, compiling")
            init_key, step_key = jax.random.split(jax.random.fold_in(key, index + 1))
            data, step_key = meta_step.place((problem.splits(), step_key))
            state, step = meta_step.init(phi, data, init_key), begin
            if run.latest > begin:
                state, step = run.restore(state), run.latest
            pending: list[dict[str, Array]] = []  # metrics of the meta-steps since the last row, still on the device
            timed, clock = 0, math.nan  # number of meta-steps since the clock was started
            to_compile = meta_step.programs
            stopping = processes.agree(stop.requested)
            while step < end and not stopping:
                state, metrics = meta_step(state, data, step_key, step)
                pending.append(metrics)
                # The device shall not wait for the host, but meta-steps shall not queue up without bound either.
                jax.block_until_ready(pending[-RUN_AHEAD:][0])
                if to_compile:  # compiling does not count
                    jax.block_until_ready(metrics)
                    to_compile, timed, clock = to_compile - 1, 0, time.perf_counter()
                else:
                    timed += 1
                step += 1
                bar.set_description(name, refresh=False)
                bar.update()
                processes.reached(step)
                stopping = processes.agree(stop.requested)
                saving = stopping or step == end or step % config.checkpoint_every == 0
                if saving or step % config.log_every == 0:
                    row = average(jax.device_get(pending), stage.truncation, problem.horizon // stage.truncation)
                    row |= {name: float(value) for name, value in lopt.scalars(jax.device_get(state.phi)).items()}
                    rate = timed * meta_step.inner_steps / (time.perf_counter() - clock) if timed else math.nan
                    run.log({"meta_step": step, "stage": name, **row, "inner_steps_per_second": rate})
                    bar.set_postfix({"meta-loss": f"{row['loss']:.4f}", "inner steps/s": f"{rate:,.0f}"}, refresh=False)
                    pending, timed, clock = [], 0, time.perf_counter()
                if saving:
                    if processes.first:
                        result = averaged(state.optimizer, state.phi)
                        if step == end and len(stages) > 1:
                            save_optimizer(run.path / "stages" / name, lopt, result)
                        save_optimizer(run.path / "optimizer", lopt, result)
                    run.save(step, state)
                    clock = time.perf_counter()  # saving does not count
            if step < end:
                break
            phi, begin = jax.device_get(averaged(state.optimizer, state.phi)), end
    if begin < total:
        if processes.first:
            print(
                f"interrupted at meta-step {step} of {total}; continue with --out {run.path} --resume", file=sys.stderr
            )
        return False
    run.mark_complete(total)
    return True


def initial_phi(config: Config, lopt: LearnedOptimizer, key: jax.Array, first: bool = True) -> PyTree:
    """Draw or read the meta-parameters, with the coefficients that the configuration sets.

    Where a checkpoint is going to replace them (not ``first``), the start need not be there any more.
    """
    start = read_start(config, lopt) if first else None
    phi = lopt.init(key) if start is None else start
    for setting in INITIAL_COEFFICIENTS:
        name, value = setting.replace("initial", "log"), getattr(config, setting)
        if value is not None and name in phi:
            phi[name] = jnp.log(jnp.asarray(value, phi[name].dtype))
    return phi


def read_start(config: Config, lopt: LearnedOptimizer) -> PyTree | None:
    """The meta-parameters to start from; None where they are to be drawn.

    Raises:
        UsageError: there is no such optimizer, or its architecture is not ``lopt``'s.
    """
    if config.start is None:
        return None
    try:
        found, phi = load_learned(config.start, lopt.structure)
    except SerializationError as error:
        raise UsageError(f"--start {config.start}: {error}") from None
    names = [f.name for f in dataclasses.fields(lopt) if getattr(found, f.name) != getattr(lopt, f.name)]
    if names:
        listed = "; ".join(f"{name} is {getattr(found, name)!r}, not {getattr(lopt, name)!r}" for name in names)
        raise UsageError(f"--start {config.start} has another architecture ({listed}); ask for that one")
    return phi


def average(metrics: Sequence[Mapping[str, np.ndarray]], truncation: int, windows: int) -> dict[str, Any]:
    """Average the metrics of several meta-steps; the losses also for each window of the horizon (None: not seen)."""
    row: dict[str, Any] = {
        name: float(np.mean([m[name] for m in metrics])) for name in ("loss", "gradient_norm", "gradient_noise")
    }
    which = np.concatenate([m["window_start"] for m in metrics]) // truncation
    losses = np.concatenate([m["window_loss"] for m in metrics])
    row["window_loss"] = [float(losses[which == w].mean()) if (which == w).any() else None for w in range(windows)]
    return row


def save_optimizer(path: Path, lopt: LearnedOptimizer, phi: PyTree) -> None:
    """Save the meta-parameters as an optimizer that :func:`gmn_lopt.load` reads."""
    try:
        save(path, lopt, phi)
    except SerializationError as error:
        raise RunError(f"{error}; earlier checkpoints are intact, continue with --resume") from None


def use_all_cores() -> None:
    """Make every core of the processor a device of its own, over which the unrolls are spread.

    The operations of small inner problems are too small to be split over threads, so one device keeps one core busy.
    A count given in XLA_FLAGS is respected, and accelerators are not affected.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def cli() -> int:
    """Run from the command line; returns the exit code."""
    use_all_cores()
    try:
        main(from_command_line(__doc__, sys.argv[1:]))
    except (UsageError, RunError, ProcessesError) as error:
        print(f"meta_train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
