"""The loop of a meta-training run: through the stages from the latest checkpoint on, logging and saving."""

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from gmn_lopt.meta.config import Config, resuming
from gmn_lopt.meta.meta_step import MetaStep
from gmn_lopt.meta.mixture import MixedMetaStep, MixtureProblem
from gmn_lopt.meta.processes import is_first
from gmn_lopt.meta.run_directory import RunDirectory, RunError
from gmn_lopt.meta.stages import Stage
from gmn_lopt.meta.training_problem import TrainingProblem
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.optimizers.saved import SerializationError, save
from gmn_lopt.util.progress import progress
from gmn_lopt.util.sealed import holds_other

RUN_AHEAD = 4  # meta-steps that may be in flight on the device before the host waits


def train(
    config: Config,
    run: RunDirectory,
    lopt: LearnedOptimizer,
    phi: PyTree,
    problem: TrainingProblem | MixtureProblem,
    meta_steps: Sequence[MetaStep | MixedMetaStep],
    stop: Callable[[int], bool],
) -> bool:
    """Go through the stages, or through what is left of them after the latest checkpoint of ``run``.

    Args:
        config: the run's.
        run: where it is logged and saved.
        lopt: the learned optimizer.
        phi: its meta-parameters at the start; where there is a checkpoint, anything of their shape.
        problem: to train on.
        meta_steps: that of each stage.
        stop: whether to stop after a meta-step; asked after each.

    Returns:
        Whether all stages are done.
    """
    key, several = jax.random.key(config.seed), len(config.stages) > 1
    ends = list(itertools.accumulate(stage.meta_steps for stage in config.stages))
    stopping, total = False, ends[-1]
    if run.latest == 0 and several:
        _save_optimizer(run.path / "stages" / "0-start", lopt, phi)
    with progress(total, "meta-training", "meta-steps", initial=run.latest, disable=not is_first()) as bar:
        for index, (stage, meta_step, end) in enumerate(zip(config.stages, meta_steps, ends, strict=True)):
            if run.latest > end:
                continue
            name, step = _stage_name(index, stage), end - stage.meta_steps
            bar.set_description(f"{name}, compiling")
            init_key, step_key = jax.random.split(jax.random.fold_in(key, index + 1))
            data, step_key = meta_step.place((problem.splits(), step_key))
            state = meta_step.init(phi, data, init_key)
            if run.latest > step:
                state, step = run.restore(state), run.latest
            rows = _Rows(stage, meta_step, problem.horizon)
            while step < end and not stopping:
                state, metrics = meta_step(state, data, step_key, step)
                rows.add(metrics)
                step += 1
                bar.set_description(name, refresh=False)
                bar.update()
                stopping = stop(step)
                saving = stopping or step == end or step % config.checkpoint_every == 0
                if saving or step % config.log_every == 0:
                    row = rows.average() | {n: float(x) for n, x in lopt.scalars(jax.device_get(state.phi)).items()}
                    rate = row.pop("inner_steps_per_second")
                    run.log({"meta_step": step, "stage": name, **row, "inner_steps_per_second": rate})
                    bar.set_postfix({"meta-loss": f"{row['loss']:.4f}", "inner steps/s": f"{rate:,.0f}"}, refresh=False)
                if saving:
                    if step == end and several:
                        _save_optimizer(run.path / "stages" / name, lopt, state.phi)
                    _save_optimizer(run.path / "optimizer", lopt, state.phi)
                    run.save(step, state)
                    rows.start_clock()  # saving does not count
            if stopping:
                break
            phi = jax.device_get(state.phi)
    if step < total:
        if is_first():
            text = f"interrupted at meta-step {step} of {total}; continue with {resuming(config)}"
            print(text, file=sys.stderr)
        return False
    run.mark_complete(total)
    return True


def check_places(config: Config) -> None:
    """Raise a RunError if something is where optimizers are to be saved: at the first save work would be lost."""
    stages = config.out / "stages" if len(config.stages) > 1 else None
    if stages is not None and os.path.lexists(stages) and not stages.is_dir():
        raise RunError(f"--out {config.out}: {stages} is not a directory; delete it to continue")
    names = ["0-start", *(_stage_name(i, stage) for i, stage in enumerate(config.stages))]
    for place in (config.out / "optimizer", *(stages / name for name in names if stages is not None)):
        if holds_other(place):
            raise RunError(f"--out {config.out}: {place} is not a saved optimizer; delete it to continue")


def _stage_name(index: int, stage: Stage) -> str:
    return f"{index + 1}-{stage.estimator}"


class _Rows:
    """The metrics of the meta-steps since the last row, still on the device, and how fast they came."""

    def __init__(self, stage: Stage, meta_step: MetaStep | MixedMetaStep, horizon: int):
        self._truncation, self._truncations = stage.truncation, horizon // stage.truncation
        self._inner_steps, self._to_compile = meta_step.inner_steps, meta_step.programs
        self._pending: list[dict[str, Array]] = []
        self._timed, self._clock = 0, math.nan

    def start_clock(self) -> None:
        """Count time and meta-steps from now on."""
        self._timed, self._clock = 0, time.perf_counter()

    def add(self, metrics: dict[str, Array]) -> None:
        """Add those of a meta-step; wait where too many are in flight."""
        self._pending.append(metrics)
        # The device shall not wait for the host, but meta-steps shall not queue up without bound either.
        jax.block_until_ready(self._pending[-RUN_AHEAD:][0])
        if self._to_compile:  # compiling does not count
            jax.block_until_ready(metrics)
            self._to_compile -= 1
            self.start_clock()
        else:
            self._timed += 1

    def average(self) -> dict[str, Any]:
        """The averages, of losses also for each truncation (None: not seen), and the speed; begin a new row."""
        metrics = jax.device_get(self._pending)
        row: dict[str, Any] = {
            name: float(np.mean([m[name] for m in metrics])) for name in ("loss", "gradient_norm", "gradient_noise")
        }
        which = np.concatenate([m["truncation_start"] for m in metrics]) // self._truncation
        losses = np.concatenate([m["truncation_loss"] for m in metrics])
        each = [losses[which == i] for i in range(self._truncations)]
        row["truncation_loss"] = [float(seen.mean()) if seen.size else None for seen in each]
        seconds = time.perf_counter() - self._clock
        row["inner_steps_per_second"] = self._timed * self._inner_steps / seconds if self._timed else math.nan
        self._pending = []
        self.start_clock()
        return row


def _save_optimizer(path: Path, lopt: LearnedOptimizer, phi: PyTree) -> None:
    """Save the meta-parameters as an optimizer that :func:`gmn_lopt.load` reads; the first process does."""
    try:
        if is_first():
            save(path, lopt, phi)
    except SerializationError as error:
        raise RunError(f"{error}; earlier checkpoints are intact, continue with --resume") from None
