"""What the directions that a learned optimizer adds to are worth by themselves, without any meta-training.

python bench/directions.py --task cifar10_mlp --directions muon:0.03 denoised:0.02 denoised:0.06:30:0.9

A direction is BASE:ALPHA for a constant step size, BASE:ALPHA:TAU:POWER for ALPHA (1 + step / TAU)^-POWER, with
:GAIN:OVERSHOOT after it for a step size that is adapted from there (gmn_lopt/step_size.py). Each is
measured against Adam at the best of a few learning rates as in eval.py; on the validation split, with seeds of its own,
so that settings may be chosen by it.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tasks/, which is not part of the package

import jax
import jax.numpy as jnp
import numpy as np
from estimator_runs import MakeLearned

from gmn_lopt.cli.command_line import parse
from gmn_lopt.evaluation import protocol
from gmn_lopt.evaluation.candidate import Candidate
from gmn_lopt.evaluation.report import spread
from gmn_lopt.evaluation.sources import adam
from gmn_lopt.evaluation.training import training_curves
from gmn_lopt.meta.task import measured_on, task_structure
from gmn_lopt.optimizers.direction import parse_direction
from gmn_lopt.util.errors import first_line
from tasks import load_task

HEAD = ("direction", "step reduction", "missed seeds", "best loss", "mean training loss")


@dataclass(frozen=True)
class Config:
    """What to measure."""

    task: str
    """Name of a file in tasks/, without .py."""
    directions: tuple[str, ...]
    """BASE:ALPHA, BASE:ALPHA:TAU:POWER or BASE:ALPHA:TAU:POWER:GAIN:OVERSHOOT each, BASE one of momentum, adam, muon
    and denoised."""
    data_dir: str | None = None
    """Directory of data sets (TensorFlow Datasets' layout); default: its own."""
    split: Literal["valid", "test"] = "valid"
    """The split that losses are measured on."""
    adam: tuple[float, ...] = (0.002, 0.004, 0.006, 0.008, 0.01)
    """Adam's learning rates; the best counts."""
    seeds: int = 3
    """Number of seeds (initialisations and batch orders)."""
    first_seed: int = 100
    """The first seed; the others follow it."""
    horizon: int | None = None
    """Training steps; default: the task's own."""


class UsageError(ValueError):
    """Something asked for cannot be done. The message is one line."""


def main(config: Config) -> str:
    """Measure; print a row as soon as it is there.

    Returns:
        The table.

    Raises:
        UsageError: in one line, what cannot be done.
    """
    try:
        task = load_task(config.task, config.data_dir)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise UsageError(f"--task {config.task}: {first_line(error)}") from error
    task = measured_on(replace(task, horizon=config.horizon or task.horizon), config.split)
    structure, every = task_structure(task), protocol.default_eval_every(task.horizon)
    try:
        parsed = [parse_direction(text, structure) for text in config.directions]
    except ValueError as error:
        raise UsageError(f"--directions: {first_line(error)}") from None
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    grid = training_curves(task, Candidate("adam", "", "", adam, jnp.array(config.adam)), seeds, every, grid=True)
    best, steps = protocol.best_setting(grid.test_loss), protocol.evaluation_steps(task.horizon, every)
    goal = protocol.target(grid.test_loss[best], steps)
    lines: list[str] = []

    def row(*cells: str) -> None:
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)

    row(*HEAD)
    row(*["---"] * len(HEAD))
    for name, curves in [(f"Adam, {config.adam[best]:g}", jax.tree.map(lambda x: x[best], grid))] + [
        (text, training_curves(task, Candidate(text, "", "", MakeLearned(lopt), phi, lopt.needs_factors), seeds, every))
        for text, (lopt, phi) in zip(config.directions, parsed)
    ]:
        factors = protocol.step_reduction(curves.test_loss, steps, goal)
        missed = int(np.isnan(factors).sum())
        losses = (curves.test_loss.min(1), curves.train_loss.mean(1))
        reached, *found = (
            spread(dict(zip(("mean", "std"), protocol.mean_and_std(x))), digits)
            for x, digits in zip((factors, *losses), (2, 4, 4))
        )
        row(name, reached, f"{missed} of {len(factors)}", *found)
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main(parse(Config, __doc__))
    except UsageError as error:
        print(f"directions.py: {error}", file=sys.stderr)
        sys.exit(2)
