"""Compare estimators of the meta-gradient, and settings of PES, at equal inner steps and at equal time.

python bench/estimators.py --out runs/estimators [--tasks cifar10_mlp] [--only pes nres 'truncated-*']

Every variant in bench/estimator_variants.py meta-trains a learned optimizer on every task, from several meta-seeds;
what results is measured against tuned Adam as in eval.py. Writes report.md with a picture for each task, anew after
each run. Interrupt it at any time: a finished run is a file, and the same command goes on with the next one.
"""

import fnmatch
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tasks/, which is not part of the package

import jax
import numpy as np
from clocks import CLOCKS
from estimator_report import write_report
from estimator_runs import Budget, evaluate, evaluate_adam, make_run, meta_train
from estimator_variants import ABLATIONS, ESTIMATORS
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

from gmn_lopt.cli.command_line import parse
from gmn_lopt.evaluation.results import Results, ResultsError
from gmn_lopt.meta.task import Task
from gmn_lopt.util.errors import first_line
from meta_train import use_all_cores
from tasks import load_task

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
    optimizer: Literal["sgdm", "ds", "ds+gmn"] = "ds"
    """The learned optimizer that is meta-trained, where a variant does not say otherwise."""
    width: int = 32
    """Width of its backbone, where a variant does not say otherwise."""
    pairs: int = 16
    """Pairs (of ``truncated`` unrolls) of a meta-step, where a variant does not say otherwise."""
    meta_learning_rates: tuple[float, ...] = (1e-3,)
    """Every variant is run with each; estimators differ in the rate that suits them."""
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


class UsageError(ValueError):
    """The command asks for something that cannot be done. The message is one line."""


def main(config: Config) -> str:
    """Do all runs that are not done, and write the report; returns its text.

    Raises:
        UsageError, ResultsError: in one line, what cannot be done.
    """
    for field in ("width", "pairs", "seeds", "eval_seeds", "inner_steps", "minutes", "horizon"):
        value = getattr(config, field)
        if value is not None and not value > 0:
            raise UsageError(f"--{field.replace('_', '-')} is {value}; it must be positive")
    names = [name for name in VARIANTS if any(fnmatch.fnmatchcase(name, pattern) for pattern in config.only)]
    if not names:
        raise UsageError(f"--only {' '.join(config.only)}: no such variant; there are {', '.join(VARIANTS)}")
    tasks = {name: find_task(name, config) for name in config.tasks}
    results = {name: open_results(config, task) for name, task in tasks.items()}
    jobs = [  # seeds outermost: all variants have a first result before any has a second
        (task, name, rate, seed)
        for seed in range(config.seeds)
        for task in tasks
        for name in names
        for rate in config.meta_learning_rates
    ]
    for task, name, rate, _ in jobs[: len(jobs) // config.seeds]:  # refuse what is impossible before the first run
        try:
            make_run(tasks[task], learned(config, name), rate, config.pairs, config.inner_steps)
        except (ValueError, TypeError) as error:
            raise UsageError(f"variant {name} on {task}: {first_line(error)}; leave it out with --only") from None
    for task in tasks:
        if results[task].load("adam", "") is None:
            print(f"{task}: tuning Adam", file=sys.stderr)
            results[task].save("adam", "", evaluate_adam(tasks[task], config.eval_seeds))
    for number, (task, name, rate, seed) in enumerate(jobs):
        if find(results[task], name, rate, seed) is None:
            label = f"{number + 1}/{len(jobs)} {task} {name} {rate:g} seed {seed}"
            one_run(config, tasks[task], results[task], name, rate, seed, label)
            report(config, tasks, results, names)
    return report(config, tasks, results, names)


def find_task(name: str, config: Config) -> Task:
    """The task of a name, with the horizon asked for."""
    try:
        task = load_task(name, config.data_dir)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"--tasks {name}: {first_line(error)}") from None
    return task if config.horizon is None else replace(task, horizon=config.horizon)


def open_results(config: Config, task: Task) -> Results:
    """The finished runs on a task."""
    settings = {
        "optimizer": config.optimizer,
        "width": config.width,
        "pairs": config.pairs,
        "horizon": task.horizon,
        "batch_size": task.batch_size,
        "eval_seeds": config.eval_seeds,
        "inner_steps": config.inner_steps,
        "minutes": config.minutes,
        "clock": config.clock,
        "device": f"{jax.local_device_count()} {jax.devices()[0].device_kind}",
    }
    return Results(config.out / task.name, settings)


def learned(config: Config, name: str) -> dict[str, Any]:
    """The settings of a variant: those of its table over the command's."""
    return {"optimizer": config.optimizer, "width": config.width} | VARIANTS[name]


def one_run(config: Config, task: Task, results: Results, name: str, rate: float, seed: int, label: str) -> None:
    """Meta-train, evaluate, save."""
    run = make_run(task, learned(config, name), rate, config.pairs, config.inner_steps)
    budget = Budget(config.inner_steps, 60 * config.minutes, CLOCKS[config.clock])
    with tqdm(total=config.inner_steps, desc=label, unit=" inner steps", unit_scale=True, mininterval=5) as bar:
        record, phis = meta_train(task, run, seed, budget, bar.update)
    curves = evaluate(task, run.lopt, phis, config.eval_seeds)
    arrays = record | curves | {"phi": np.stack([ravel_pytree(phi)[0] for phi in phis])}
    results.save(f"{name} {rate:g} {seed}", fingerprint(name), arrays)


def find(results: Results, name: str, rate: float, seed: int) -> dict[str, np.ndarray] | None:
    """A finished run; None where there is none, or the variant has been changed in its table since."""
    return results.load(f"{name} {rate:g} {seed}", fingerprint(name))


def fingerprint(name: str) -> str:
    """What a variant's results depend on beside the command's settings."""
    return json.dumps(VARIANTS[name], sort_keys=True, default=repr)


def report(config: Config, tasks: dict[str, Task], results: dict[str, Results], names: list[str]) -> str:
    """Write the report of what has finished."""
    found: dict[str, Any] = {}
    for task in tasks:
        variants = {}
        for name in names:
            for rate in config.meta_learning_rates:
                runs = [find(results[task], name, rate, seed) for seed in range(config.seeds)]
                label = name if len(config.meta_learning_rates) == 1 else f"{name}, {rate:g}"
                if any(run is not None for run in runs):
                    variants[label] = [run for run in runs if run is not None]
        found[task] = (tasks[task].horizon, results[task].load("adam", ""), variants)
    rates = ", ".join(f"{rate:g}" for rate in config.meta_learning_rates)
    about = (
        f"`{config.optimizer}` of width {config.width}, meta-learning rate {rates}, {config.pairs} pairs; budgets: "
        f"{config.inner_steps:,} inner steps and {config.minutes:g} minutes ({config.clock} clock) per run, on "
        f"{jax.local_device_count()} {jax.devices()[0].device_kind} device(s); "
        f"{config.eval_seeds} evaluation seeds."
    )
    return write_report(config.out, about, found)


def cli(args: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    config = parse(Config, __doc__, args)
    use_all_cores()
    # The seeds of a variant share their programs, and so does the same command when it goes on.
    jax.config.update("jax_compilation_cache_dir", str(config.out / "compiled"))
    try:
        print(main(config))
    except (UsageError, ResultsError) as error:
        print(f"estimators.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"estimators.py: interrupted; the same command goes on from what is in {config.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
