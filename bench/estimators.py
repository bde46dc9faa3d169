"""Compare estimators of the meta-gradient, and recipes, at equal inner steps: meta-train each, then evaluate all.

python -m bench.estimators --out runs/estimators --optimizers ds ds-8 --stages nres 'truncated:truncation=25 pes'

Every recipe is meta-trained with every plan of stages from several meta-seeds, and evaluated like ``gmn-eval`` does.
Prints a table after each meta-seed. Interrupt it at any time: the same command goes on where it stopped.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import jax
import numpy as np

from gmn_lopt.cli import eval as evaluation
from gmn_lopt.cli import meta_train
from gmn_lopt.cli.command_line import parse
from gmn_lopt.evaluation.protocol import mean_and_std
from gmn_lopt.evaluation.tables import markdown_table, spread
from gmn_lopt.meta.config import Config as Training
from gmn_lopt.meta.run_directory import RunError
from gmn_lopt.meta.stages import Stage, parse_stage
from gmn_lopt.networks.pointwise import PointwiseMLP
from gmn_lopt.optimizers.features import ScaleFree
from gmn_lopt.optimizers.recipes import DS, RECIPES, Recipe
from gmn_lopt.optimizers.residual import Residual
from gmn_lopt.optimizers.rules import Additive
from gmn_lopt.optimizers.step_size import Feedback, PowerLaw
from gmn_lopt.util.errors import UsageError, first_line
from gmn_lopt.util.files import write_atomically
from gmn_lopt.util.hardware import use_all_cores
from gmn_lopt.util.threads import one_blas_thread
from tools.facts import training_seconds

# Each changes one thing of "ds"; copy one to try another.
ABLATIONS: dict[str, Recipe] = {
    "ds-from-zero": replace(DS, residual=Residual(output_scale=0.0)),
    "ds-bounded": replace(DS, rule=Additive(bound=1.0)),
    "ds-falling": replace(DS, step_size=PowerLaw()),
    "ds-adapting": replace(DS, step_size=PowerLaw(feedback=Feedback())),
    "ds-8": replace(DS, residual=Residual(network=PointwiseMLP(8))),
    "ds-scale-free": replace(DS, residual=Residual(features=ScaleFree())),
}
MEASURES = {"mean_training_loss": 4, "best_test_loss": 4, "step_reduction": 2}
HEAD = ("variant", "meta-loss", "best test loss", "step reduction", "misses", "inner steps", "seconds")


@dataclass(frozen=True)
class Config:
    """What to compare."""

    out: Path
    """Directory of the runs and of the evaluation."""
    task: str = "cifar10_mlp"
    """A task, as for gmn-meta-train."""
    optimizers: tuple[str, ...] = ("ds",)
    """Recipes: those of gmn-meta-train, and the ablations in bench/estimators.py."""
    stages: tuple[str, ...] = ("pes", "es", "nres", "truncated:truncation=25", "truncated:truncation=25 pes")
    """Plans of stages, which are written like --stage of gmn-meta-train, with a space between one and the next. They
    share the inner steps evenly."""
    learning_rate: float = 1e-3
    """Meta-learning rate, where a stage does not say otherwise."""
    inner_steps: int = 1_000_000
    """Inner steps of a run, over all unrolls; decides the number of meta-steps."""
    seeds: int = 3
    """Meta-seeds of every variant."""
    eval_seeds: int = 3
    """Seeds (initialisations and batch orders) that a result is evaluated on."""
    horizon: int | None = None
    """Inner steps of one inner problem; default: the task's."""
    data_dir: str | None = None
    """Directory of data sets (TensorFlow Datasets' layout); default: its own."""


@dataclass(frozen=True)
class Variant:
    """A recipe with a plan of stages: how it is meta-trained, and the inner steps of one meta-step of each stage."""

    training: Training
    inner_steps: tuple[int, ...]

    def run(self, seed: int) -> Training:
        """The run from a meta-seed; its directory is called after variant and seed."""
        out = self.training.out
        return replace(self.training, out=out.with_name(f"{out.name} seed {seed}"), seed=seed)


def make_variant(config: Config, optimizer: str, stages: str) -> Variant:
    """Make a variant; raises :class:`UsageError`, in one line, if it is not possible on this task."""
    try:
        if optimizer not in RECIPES | ABLATIONS:
            raise ValueError(f"unknown recipe; choose one of {', '.join(RECIPES | ABLATIONS)}")
        training = Training(
            config.task,
            config.out / "runs" / f"{optimizer} {stages}",
            (RECIPES | ABLATIONS)[optimizer],
            data_dir=config.data_dir,
            horizon=config.horizon,
            resume=True,
        )
        _, problem = meta_train.make_problem(training)
        plan = [parse_stage(text, Stage(learning_rate=config.learning_rate)) for text in stages.split()]
        inner_steps = tuple(stage.meta_step(problem).inner_steps for stage in plan)
        share = config.inner_steps / len(plan)
        timed = tuple(replace(stage, meta_steps=math.ceil(share / n)) for stage, n in zip(plan, inner_steps))
        return Variant(replace(training, stages=timed), inner_steps)
    except ValueError as error:
        raise UsageError(f"{optimizer} with stages {stages!r}: {first_line(error)}") from None


def main(config: Config) -> str:
    """Do all runs that are not done, print the tables, and return the last one.

    Raises:
        UsageError, RunError: in one line, what cannot be done.
        KeyboardInterrupt: when a signal ended a run early.
    """
    for field in ("inner_steps", "seeds", "eval_seeds"):
        if getattr(config, field) < 1:
            raise UsageError(f"--{field.replace('_', '-')} must be at least 1")
    pairs = product(config.optimizers, config.stages)
    variants = {f"{optimizer} {stages}": make_variant(config, optimizer, stages) for optimizer, stages in pairs}
    written = ""
    for seed in range(config.seeds):  # outermost: all variants have a first result before any has a second
        for variant in variants.values():
            if not meta_train.main(variant.run(seed)):
                raise KeyboardInterrupt
        written = table(config, variants, seed + 1)
        print(written, flush=True)
    return written


def table(config: Config, variants: Mapping[str, Variant], seeds: int) -> str:
    """Evaluate the variants' first meta-seeds; also writes the table into report.md."""
    runs = {name: [variant.run(seed).out for seed in range(seeds)] for name, variant in variants.items()}
    paths = tuple(str(path) for each in runs.values() for path in each)
    report = evaluation.main(
        evaluation.Config(
            task=config.task,
            out=config.out / "evaluation",
            optimizer=paths,
            data_dir=config.data_dir,
            horizon=config.horizon,
            seeds=config.eval_seeds,
            timing_rounds=1,
            protocol="paper",
        )
    )
    adam, *others = report["optimizers"]
    lines = [["tuned Adam", *(spread(adam[key], digits) for key, digits in MEASURES.items()), "", "", ""]]
    for i, (name, variant) in enumerate(variants.items()):
        rows = others[i * seeds : (i + 1) * seeds]
        steps = sum(n * stage.meta_steps for n, stage in zip(variant.inner_steps, variant.training.stages))
        seconds = [_seconds(path, variant) for path in runs[name]]
        misses = f"{sum(row['misses'] for row in rows)}/{seeds * config.eval_seeds}"
        cells = [_over_seeds([row[key]["mean"] for row in rows], key, digits) for key, digits in MEASURES.items()]
        lines.append([name, *cells, misses, f"{steps:,}", f"{np.mean(seconds):,.0f}"])
    text = markdown_table(HEAD, lines)
    write_atomically(config.out / "report.md", f"# {config.task}\n\n{text}\n".encode())
    return text


def _seconds(path: Path, variant: Variant) -> float:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    seconds = training_seconds(rows, variant.inner_steps)
    return math.nan if seconds is None else seconds  # too short to tell


def _over_seeds(means: Sequence[float | None], key: str, digits: int) -> str:
    """Mean and deviation over meta-seeds of what is a mean over evaluation seeds already, of factors without misses."""
    if key != "step_reduction" and None in means:
        return "diverged"
    return spread(mean_and_std(np.array(means, float)), digits)


def cli(args: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    config = parse(Config, __doc__, args)
    use_all_cores()
    one_blas_thread()
    # The seeds of a variant share their programs, and so does the same command when it goes on.
    jax.config.update("jax_compilation_cache_dir", str(config.out / "compiled"))
    try:
        main(config)
    except (UsageError, RunError) as error:
        print(f"bench.estimators: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bench.estimators: interrupted; the same command goes on from what is in {config.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
