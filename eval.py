"""Evaluate optimizers against tuned Adam on a task.

python eval.py --task digits_mlp --optimizer runs/digits --optimizer optax:lion:learning_rate=3e-4 --out report/

Every optimizer trains from the same initialisations on the same batches. The report says how many times fewer steps
than tuned Adam it takes to Adam's best test loss, and at what cost per step. Interrupt it at any time: the same command
goes on where it stopped.

Transfer, to other tasks or to other settings of the same one, is measured in the same command:
python eval.py --task cifar10_mlp --optimizer runs/c10 --transfer cifar100_mlp --transfer cifar10_mlp:hidden=64 ...
"""

import ast
import hashlib
import importlib.metadata
import inspect
import json
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from gmn_lopt.cli.command_line import parse
from gmn_lopt.evaluation import plots, protocol
from gmn_lopt.evaluation.candidate import Candidate
from gmn_lopt.evaluation.report import Outcome, build_report, markdown, table, task_title, transfer_table
from gmn_lopt.evaluation.results import Results, ResultsError
from gmn_lopt.evaluation.sources import SourceError, adam, find_candidate, split_label, split_settings
from gmn_lopt.evaluation.timing import time_per_step
from gmn_lopt.evaluation.training import Curves, training_curves
from gmn_lopt.meta.task import Task, measured_on, task_structure
from gmn_lopt.tasks import load_task
from gmn_lopt.util.errors import first_line
from gmn_lopt.util.files import write_atomically
from gmn_lopt.util.hardware import describe_hardware


class UsageError(ValueError):
    """The configuration asks for something that cannot be done."""


@dataclass(frozen=True)
class Config:
    """What to evaluate, and how.

    Attributes:
        task: Name of a file in tasks/, without .py.
        out: Directory for report.json, report.md, the pictures, and results/ (what an evaluation resumes from).
        optimizer: An optimizer to compare with tuned Adam; repeat the flag for several. A run directory of
            meta_train.py, a directory saved by gmn_lopt.save, the name of a shipped optimizer, or
            optax:NAME:key=value,key=value (any optimizer of optax, as in optax:lion:learning_rate=3e-4). Learned
            optimizers that take a learning rate get it in the same way, runs/c10:learning_rate=3e-3. LABEL= in front
            of it sets its name in the report.
        task_setting: A setting of the task as NAME=VALUE, such as hidden=64 or batch_size=64; repeat the flag for
            several. The settings are the arguments of make() in the task's file.
        transfer: Another task on which to evaluate the same optimizers, as NAME or NAME:setting=value,setting=value;
            repeat the flag for several. Each gets a report of its own in the directory transfer/ of the report, and
            transfer.md puts them side by side.
        data_dir: Directory of data sets and their caches; default: the task's own.
        split: The split that stands for the test split: test, or valid, to choose between optimizers (with seeds of
            its own, --first-seed 100) without looking at what they are judged by.
        seeds: Number of seeds (initialisations and batch orders).
        first_seed: The first seed; the others follow it.
        horizon: Training steps of each run; default: the task's own.
        eval_every: Steps between test losses, a divisor of the horizon; default: 1 up to a horizon of 500, beyond it
            the largest divisor of the horizon up to 10.
        smoothing: Window of the trailing running mean over test losses, in evaluations; 1: none. The same for all,
            Adam included.
        rates_at_once: Learning rates of Adam's grid trained at once, each with all seeds; fewer need less memory.
        timing_rounds: Rounds in which the time per step of all optimizers is measured in turn.
    """

    task: str
    out: Path
    optimizer: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    task_setting: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    transfer: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    data_dir: str | None = None
    split: Literal["test", "valid"] = "test"
    seeds: int = 5
    first_seed: int = 0
    horizon: int | None = None
    eval_every: int | None = None
    smoothing: int = 1
    rates_at_once: int = 5
    timing_rounds: int = 11


@dataclass(frozen=True)
class Problem:
    """One task on which the optimizers are evaluated, checked and ready to go.

    Attributes:
        config: what is evaluated on it, and how.
        task: the task, its horizon and its test split as the configuration wants them.
        settings: what the results depend on beside the optimizers.
        results: what has been computed so far.
        candidates: the optimizers.
    """

    config: Config
    task: Task
    settings: dict[str, Any]
    results: Results
    candidates: list[Candidate]


def main(config: Config) -> dict[str, Any]:
    """Run the evaluation, write the reports, print the tables; returns the report on ``--task``.

    Raises:
        UsageError, SourceError, ResultsError, ProtocolError: in one line, if it cannot be done.
    """
    _check_counts(config)
    problems = [prepare(each) for each in (config, *transfers(config))]  # what is wrong shows before anything runs
    reports = [evaluate(problem) for problem in problems]
    if config.transfer:
        summary = transfer_table(reports)
        write_atomically(config.out / "transfer.md", f"# Transfer\n\n{summary}\n".encode())
        print(f"{summary}\nwrote {config.out / 'transfer.md'}")
    return reports[0]


def transfers(config: Config) -> list[Config]:
    """The evaluations that ``--transfer`` asks for, each with its own directory below ``--out``.

    Raises:
        UsageError: if one is not of the form ``NAME:setting=value,...``, or stands there twice.
    """
    found: dict[str, Config] = {}
    for spec in config.transfer:
        try:
            name, settings = split_settings(spec, "--transfer")
        except SourceError as error:
            raise UsageError(str(error)) from None
        key = name + "".join(f",{setting}={value}" for setting, value in settings.items()).replace(" ", "")
        directory = re.sub(r"[^\w.,=+-]", "-", key)
        if directory in found:
            raise UsageError(f"--transfer {spec!r}: give each task once")
        task_setting = tuple(f"{setting}={value!r}" for setting, value in settings.items())
        out = config.out / "transfer" / directory
        found[directory] = replace(config, task=name, task_setting=task_setting, transfer=(), out=out)
    return list(found.values())


def prepare(config: Config) -> Problem:
    """Make the task, find the optimizers, and open what has been computed before.

    Raises:
        UsageError, SourceError, ResultsError: in one line, if it cannot be done.
    """
    task_settings = parse_task_settings(config.task_setting)
    task = find_task(config.task, config.data_dir, **task_settings)
    task = replace(task, horizon=task.horizon if config.horizon is None else config.horizon)
    task = measured_on(task, config.split)
    eval_every = protocol.default_eval_every(task.horizon) if config.eval_every is None else config.eval_every
    if task.horizon % eval_every:
        raise UsageError(f"--eval-every {eval_every} does not divide the horizon of {task.horizon} steps")

    settings: dict[str, Any] = {
        "task": task.name,
        "seeds": list(range(config.first_seed, config.first_seed + config.seeds)),
        "horizon": task.horizon,
        "eval_every": eval_every,
        "smoothing": config.smoothing,
        "batch_size": task.batch_size,
        "test_examples": len(jax.tree.leaves(task.data["test"])[0]),
        "loss_cap": task.loss_cap,
        "data": _digest(task.data),
        "task_file": _file_digest(task),
        "device": jax.devices()[0].device_kind,
    }
    if config.split != "test":
        settings["split"] = config.split
    if task_settings:
        settings["task_settings"] = task_settings
    if task.test_subset:
        settings["test_subset"] = task.test_subset
    candidates = find_candidates(config.optimizer, task)
    return Problem(config, task, settings, Results(config.out / "results", settings), candidates)


def evaluate(problem: Problem) -> dict[str, Any]:
    """Evaluate the optimizers on one task, write the report, print the table; returns the report.

    Raises:
        ProtocolError: in one line, if it cannot be done.
    """
    config, task, settings, results = problem.config, problem.task, problem.settings, problem.results
    seeds, eval_every, candidates = settings["seeds"], settings["eval_every"], problem.candidates
    weights = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))

    # Training. One unit of work per part of Adam's grid and per optimizer; finished ones are read back.
    n = config.rates_at_once
    rates = [protocol.LEARNING_RATES[i : i + n] for i in range(0, len(protocol.LEARNING_RATES), n)]
    baseline = Candidate("adam", "", "adam", adam)
    units = [(f"adam {part[0]:g}-{part[-1]:g}", replace(baseline, hyper=jnp.array(part)), len(part)) for part in rates]
    units += [(f"optimizer {candidate.name}", candidate, 0) for candidate in candidates]
    found = [results.load(name, candidate.fingerprint) for name, candidate, _ in units]
    pending = sum(max(1, count) for (_, _, count), arrays in zip(units, found) if arrays is None)
    curves: list[Curves] = []
    with tqdm(total=pending * len(seeds) * task.horizon, unit=" steps", unit_scale=True, disable=not pending) as bar:
        for (name, candidate, settings_at_once), arrays in zip(units, found):
            if arrays is None:
                bar.set_description(candidate.name)
                arrays = training_curves(
                    *(task, candidate, seeds, eval_every),
                    grid=settings_at_once > 0,
                    record_weights=weights == 2,
                    progress=bar.update,
                )._asdict()
                results.save(name, candidate.fingerprint, arrays)
            curves.append(Curves(**arrays))
    grid = Curves(*(np.concatenate(parts) for parts in zip(*curves[: len(rates)])))
    best = protocol.best_setting(protocol.smooth(grid.test_loss, config.smoothing))
    curves = [Curves(*(part[best] for part in grid)), *curves[len(rates) :]]
    rate = protocol.LEARNING_RATES[best]
    baseline = replace(baseline, source=f"optax:adam:learning_rate={rate:g}", hyper=jnp.array(rate))

    # Timing. All in turn in one run: if one optimizer is new or has changed, all are measured again.
    everyone = [baseline, *candidates]
    fingerprint = " ".join([str(config.timing_rounds), *(candidate.fingerprint for candidate in everyone)])
    timed = results.load("timing", fingerprint)
    if timed is None:
        with tqdm(total=config.timing_rounds * len(everyone), desc="time per step", unit=" rounds") as bar:
            times = time_per_step(task, everyone, rounds=config.timing_rounds, progress=bar.update)
        timed = {"seconds": times}
        results.save("timing", fingerprint, timed)

    # Report.
    outcomes = [
        Outcome(candidate.name, candidate.source, c.test_loss, c.train_loss, seconds, c.weights, candidate.digest)
        for candidate, c, seconds in zip(everyone, curves, timed["seconds"])
    ]
    report = build_report(settings, _environment(), seeds, grid.test_loss, outcomes)
    pictures = ["curves.png"]
    steps = protocol.evaluation_steps(task.horizon, eval_every)
    title = task_title(settings)
    plots.plot_curves(config.out / "curves.png", title, steps, config.smoothing, outcomes)
    if weights == 2:
        pictures.append("trajectories.png")
        plots.plot_trajectories(config.out / "trajectories.png", title, _loss_at(task), seeds, outcomes)
    write_atomically(config.out / "report.json", json.dumps(report, indent=1, allow_nan=False).encode())
    write_atomically(config.out / "report.md", markdown(report, pictures).encode())
    print(table(report))
    print("wrote " + ", ".join(str(config.out / name) for name in ("report.json", "report.md", *pictures)))
    return report


def parse_task_settings(specs: Sequence[str]) -> dict[str, Any]:
    """Parse ``NAME=VALUE`` settings, each value a Python literal or a bare word; nothing is evaluated.

    Raises:
        UsageError: if one is not of this form, or a name is given twice.
    """
    settings: dict[str, Any] = {}
    for spec in specs:
        name, equals, value = (part.strip() for part in spec.partition("="))
        try:
            parsed = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            parsed, equals = value, equals if value.isidentifier() else ""
        if not equals or not name.isidentifier():
            raise UsageError(f"--task-setting {spec!r}: write NAME=VALUE, as in hidden=64 or augment=False")
        if name in settings or name == "data_dir":
            hint = "use --data-dir" if name == "data_dir" else "give each setting once"
            raise UsageError(f"--task-setting {spec!r}: {hint}")
        settings[name] = parsed
    return settings


def find_task(name: str, data_dir: str | None, **settings: Any) -> Task:
    """Make the task of a file in ``tasks/``, with settings of its own.

    Raises:
        UsageError: if there is no such task, it refuses a setting, or its data or a package that it needs are missing.
    """
    try:
        return load_task(name, data_dir, **settings)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--task {name}: {first_line(error)}") from None


def find_candidates(specs: Sequence[str], task: Task) -> list[Candidate]:
    """Find all optimizers that ``--optimizer`` names; analyses the task's model for them.

    Raises:
        SourceError: if one cannot be had, or two have one name.
    """
    structure = None
    if not all(split_label(spec)[1].startswith("optax:") for spec in specs):
        structure = task_structure(task)
    candidates: list[Candidate] = []
    for spec in specs:
        candidate = find_candidate(spec, task, structure, candidates)
        if candidate.name in ("adam", *(other.name for other in candidates)):
            raise SourceError(
                f"--optimizer {spec!r}: the name {candidate.name!r} is taken; put another label in front, LABEL=..."
            )
        candidates.append(candidate)
    return candidates


def _check_counts(config: Config) -> None:
    for field in ("seeds", "horizon", "eval_every", "smoothing", "rates_at_once", "timing_rounds"):
        value = getattr(config, field)
        if value is not None and value < 1:
            raise UsageError(f"--{field.replace('_', '-')} must be at least 1, not {value}")
    if config.first_seed < 0:
        raise UsageError(f"--first-seed must not be negative, is {config.first_seed}")


def _loss_at(task: Task) -> Any:
    """The test loss at many points, of a task with two weights."""
    params = jax.eval_shape(task.init, jax.random.key(0))

    def loss(point):
        parts = jnp.split(point, np.cumsum([leaf.size for leaf in jax.tree.leaves(params)])[:-1])
        leaves = [part.reshape(leaf.shape) for part, leaf in zip(parts, jax.tree.leaves(params))]
        return task.loss(jax.tree.unflatten(jax.tree.structure(params), leaves), task.data["test"])

    return lambda points: np.asarray(jax.lax.map(loss, jnp.asarray(points, jnp.float32)))


def _digest(data: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(dict(data)):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def _file_digest(task: Task) -> str:
    """A digest of the task's file and of those that its functions come from."""
    files = {Path(str(inspect.getsourcefile(function))).resolve() for function in (task.init, task.loss, task.sample)}
    own = (Path(__file__).parent / "tasks" / f"{task.name}.py").resolve()
    parts = [file.read_bytes() for file in (own, *sorted(files - {own}))]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _environment() -> dict[str, str]:
    packages = ("gmn_lopt", "jax", "jaxlib", "flax", "optax", "numpy")
    return {package: importlib.metadata.version(package) for package in packages} | {
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].platform}, {jax.devices()[0].device_kind}",
        "machine": describe_hardware(),
    }


def cli(args: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    config = parse(Config, __doc__, args)
    try:
        main(config)
    except (UsageError, SourceError, ResultsError, protocol.ProtocolError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"eval.py: interrupted; the same command goes on from what is in {config.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
