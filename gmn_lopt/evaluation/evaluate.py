"""Optimizers against tuned Adam on one task, from what is asked for to the report.

Finished parts are files, see :mod:`gmn_lopt.evaluation.results`: an interrupted evaluation goes on where it stopped.
"""

import hashlib
import importlib.metadata
import inspect
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from gmn_lopt.evaluation import plots, protocol
from gmn_lopt.evaluation.report import build_report, markdown, task_title
from gmn_lopt.evaluation.results import Results
from gmn_lopt.evaluation.sources import adam, find_candidates
from gmn_lopt.evaluation.timing import Timing, time_per_step
from gmn_lopt.evaluation.training import Candidate, Curves, training_curves
from gmn_lopt.meta.task import Task, measured_on
from gmn_lopt.util.checks import LONGEST_HORIZON, shown
from gmn_lopt.util.errors import UsageError
from gmn_lopt.util.files import write_atomically
from gmn_lopt.util.hardware import describe_hardware
from gmn_lopt.util.progress import progress

LIMITS = {
    **dict.fromkeys(("horizon", "eval_every", "smoothing"), LONGEST_HORIZON),
    **dict.fromkeys(("seeds", "rates_at_once", "timing_rounds"), 10_000),
    "first_seed": 2**31,
}
"""The largest values of what is counted."""

SMALL = 1_000_000
"""Models of fewer parameters are timed on one core."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How to evaluate.

    Attributes:
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

    split: Literal["test", "valid"] = "test"
    seeds: int = 5
    first_seed: int = 0
    horizon: int | None = None
    eval_every: int | None = None
    smoothing: int = 1
    rates_at_once: int = 5
    timing_rounds: int = 11

    def check(self) -> None:
        """Raise :class:`UsageError` if a number is not possible."""
        for name, most in LIMITS.items():
            value, least = getattr(self, name), 0 if name == "first_seed" else 1
            if value is not None and not least <= value <= most:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} must be at least {least} and at most {most}, not {shown(value)}")


@dataclass(frozen=True)
class Problem:
    """One task on which optimizers are evaluated, checked and ready to go."""

    config: EvaluationConfig
    task: Task  # its horizon and its test split as the configuration wants them
    candidates: list[Candidate]
    settings: dict[str, Any]  # what the results depend on beside the optimizers
    results: Results
    out: Path


def prepare(
    task: Task,
    optimizers: Sequence[str],
    out: Path,
    config: EvaluationConfig,
    task_settings: Mapping[str, Any] | None = None,
    files: Sequence[Path] = (),
) -> Problem:
    """Find the optimizers, and open what has been computed before.

    Args:
        task: the task.
        optimizers: what :func:`gmn_lopt.evaluation.sources.find_candidates` finds.
        out: directory for the report and the results.
        config: how to evaluate.
        task_settings: the settings that the task was made with.
        files: files that the task is made of, beside those of its functions.

    Raises:
        UsageError: in one line, if it cannot be done.
    """
    task = measured_on(replace(task, horizon=config.horizon or task.horizon), config.split)
    eval_every = config.eval_every or protocol.default_eval_every(task.horizon)
    if task.horizon % eval_every:
        raise UsageError(f"--eval-every {eval_every} does not divide the horizon of {task.horizon} steps")
    optional = {
        "split": config.split if config.split != "test" else None,
        "task_settings": dict(task_settings or {}),
        "test_subset": task.test_subset,
    }
    settings: dict[str, Any] = {
        "task": task.name,
        "seeds": list(range(config.first_seed, config.first_seed + config.seeds)),
        "horizon": task.horizon,
        "eval_every": eval_every,
        "smoothing": config.smoothing,
        "batch_size": task.batch_size,
        "test_examples": len(jax.tree.leaves(task.data["test"])[0]),
        "loss_cap": task.loss_cap,
        "data": _data_digest(task.data),
        "task_file": _file_digest(task, files),
        "device": jax.devices()[0].device_kind,
        **{key: value for key, value in optional.items() if value},
    }
    candidates = find_candidates(optimizers, task)
    return Problem(config, task, candidates, settings, Results(out / "results", settings), out)


def evaluate(problem: Problem) -> tuple[dict[str, Any], list[Path]]:
    """Evaluate the optimizers, and write the report; returns the report and the files."""
    settings, out = problem.settings, problem.out
    grid, curves = train(problem)
    best = protocol.best_setting(protocol.smooth(grid.test_loss, settings["smoothing"]))
    rate = protocol.LEARNING_RATES[best]
    baseline = replace(_baseline([rate]), source=f"optax:adam:learning_rate={rate:g}", hyper=jnp.array(rate))
    everyone, curves = [baseline, *problem.candidates], [Curves(*(part[best] for part in grid)), *curves]
    report = build_report(settings, _environment(), grid.test_loss, everyone, curves, time_steps(problem, everyone))
    pictures, title, named = ["curves.png"], task_title(settings), dict(zip((c.name for c in everyone), curves))
    steps = np.array(report["curves"]["steps"])
    plots.plot_curves(out / "curves.png", title, steps, settings["smoothing"], named)
    if _weights(problem.task) == 2:
        pictures.append("trajectories.png")
        plots.plot_trajectories(out / "trajectories.png", title, _loss_at(problem.task), settings["seeds"], named)
    write_atomically(out / "report.json", json.dumps(report, indent=1, allow_nan=False).encode())
    write_atomically(out / "report.md", markdown(report, pictures).encode())
    return report, [out / name for name in ("report.json", "report.md", *pictures)]


def train(problem: Problem) -> tuple[Curves, list[Curves]]:
    """The curves of Adam's grid, ``[rates, ...]``, and of each optimizer; trained where not done before."""
    task, results, seeds, n = problem.task, problem.results, problem.settings["seeds"], problem.config.rates_at_once
    parts = [protocol.LEARNING_RATES[i : i + n] for i in range(0, len(protocol.LEARNING_RATES), n)]
    units = {f"adam {part[0]:g}-{part[-1]:g}": (_baseline(part), len(part)) for part in parts}
    units |= {f"optimizer {candidate.name}": (candidate, 0) for candidate in problem.candidates}
    found = {name: results.load(name, candidate.fingerprint) for name, (candidate, _) in units.items()}
    pending = sum(max(1, units[name][1]) for name, arrays in found.items() if arrays is None)
    curves = []
    total = pending * len(seeds) * task.horizon
    with progress(total, "training", "steps", scale=True, disable=not pending) as bar:
        for name, (candidate, rates) in units.items():
            arrays = found[name]
            if arrays is None:
                bar.set_description(candidate.name, refresh=False)
                arrays = training_curves(
                    *(task, candidate, seeds, problem.settings["eval_every"]),
                    grid=rates > 0,
                    record_weights=_weights(task) == 2,
                    progress=bar.update,
                )._asdict()
                results.save(name, candidate.fingerprint, arrays)
            curves.append(Curves(**arrays))
    return Curves(*(np.concatenate(each) for each in zip(*curves[: len(parts)]))), curves[len(parts) :]


def time_steps(problem: Problem, everyone: Sequence[Candidate]) -> Timing:
    """The time per step of all in turn in one run: if one is new or has changed, all are measured again."""
    rounds = problem.config.timing_rounds
    fingerprint = " ".join([f"{rounds} rounds", *(candidate.fingerprint for candidate in everyone)])
    timed = problem.results.load("timing", fingerprint)
    if timed is None:
        on_one_core = jax.default_backend() == "cpu" and _weights(problem.task) < SMALL
        with progress(rounds * len(everyone), "time per step", "rounds") as bar:
            timing = time_per_step(problem.task, everyone, rounds=rounds, on_one_core=on_one_core, progress=bar.update)
        timed = {name: np.asarray(value) for name, value in timing._asdict().items()}
        problem.results.save("timing", fingerprint, timed)
    return Timing(timed["seconds"], bool(timed["one_core"]), float(timed["waiting"]))


def _baseline(rates: Sequence[float]) -> Candidate:
    return Candidate("adam", "", "adam", adam, jnp.array(rates))


def _weights(task: Task) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))


def _loss_at(task: Task) -> Callable[[np.ndarray], np.ndarray]:
    """The test loss at many points, of a task with two weights."""
    _, unravel = ravel_pytree(task.init(jax.random.key(0)))
    loss = lambda point: task.loss(unravel(point), task.data["test"])  # noqa: E731
    return lambda points: np.asarray(jax.lax.map(loss, jnp.asarray(points, jnp.float32)))


def _data_digest(data: PyTree) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(dict(data)):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def _file_digest(task: Task, files: Sequence[Path]) -> str:
    """A digest of the files that a task is made of, and of those that its functions come from."""
    functions = {Path(str(inspect.getsourcefile(function))) for function in (task.init, task.loss, task.sample)}
    own = [file.resolve() for file in files]
    others = sorted({file.resolve() for file in functions} - set(own))
    return hashlib.sha256(b"".join(file.read_bytes() for file in (*own, *others))).hexdigest()[:16]


def _environment() -> dict[str, str]:
    packages = ("gmn_lopt", "jax", "jaxlib", "flax", "optax", "numpy")
    return {package: importlib.metadata.version(package) for package in packages} | {
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].platform}, {jax.devices()[0].device_kind}",
        "machine": describe_hardware(),
    }
