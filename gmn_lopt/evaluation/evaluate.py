"""Optimizers against tuned baselines on one task, from what is asked for to the report.

Finished parts are files, see :mod:`gmn_lopt.evaluation.results`: an interrupted evaluation goes on where it stopped.
"""

import hashlib
import importlib.metadata
import inspect
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree
from matplotlib.figure import Figure

from gmn_lopt.evaluation import plots, protocol
from gmn_lopt.evaluation.baselines import BASELINES
from gmn_lopt.evaluation.fair import Fair
from gmn_lopt.evaluation.paper import Paper
from gmn_lopt.evaluation.report import build_report, goal_of, markdown, task_title
from gmn_lopt.evaluation.results import Results
from gmn_lopt.evaluation.runs import Runs, weights
from gmn_lopt.evaluation.sources import find_candidates
from gmn_lopt.evaluation.timing import Timing, time_per_step
from gmn_lopt.evaluation.training import Candidate
from gmn_lopt.meta.task import Task, measured_on
from gmn_lopt.util.checks import LONGEST_HORIZON, shown
from gmn_lopt.util.errors import UsageError, first_line
from gmn_lopt.util.files import write_atomically
from gmn_lopt.util.hardware import describe_hardware
from gmn_lopt.util.progress import progress

LIMITS = {
    **dict.fromkeys(("horizon", "eval_every", "smoothing"), LONGEST_HORIZON),
    **dict.fromkeys(("seeds", "trials_at_once", "timing_rounds"), 10_000),
    "first_seed": 2**31,
}
"""The largest values of what is counted."""

SMALL = 1_000_000
"""Models of fewer parameters are timed on one core."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How to evaluate.

    Attributes:
        protocol: fair: tuned and scheduled baselines, compared at the end of the horizon. paper: steps to the best test
            loss of Adam, tuned at a constant rate, for the paper's table.
        baseline: A baseline of the fair protocol, adamw, nadamw, muon, soap or kron; repeat the flag for several.
            Default: all.
        split: The split that stands for the test split: test, or valid, to choose between optimizers (with seeds of
            its own, --first-seed 100) without looking at what they are judged by.
        seeds: Number of seeds (initialisations and batch orders).
        first_seed: The first seed; the others follow it.
        horizon: Training steps of each run; default: the task's own.
        eval_every: Steps between test losses, a divisor of the horizon; default: 1 up to a horizon of 500, beyond it
            the largest divisor of the horizon up to 10.
        smoothing: Window of the trailing running mean over test losses, in evaluations; 1: none. The same for all,
            baselines included.
        trials_at_once: Settings of a baseline trained at once, each with all its seeds; fewer need less memory. In the
            fair protocol it is a round of the search, which ends when the best is inside the grid for each baseline.
            Default: 9, in the paper's protocol 5.
        timing_rounds: Rounds in which the time per step of all optimizers is measured in turn.
    """

    protocol: Literal["fair", "paper"] = "fair"
    baseline: tuple[str, ...] = ()
    split: Literal["test", "valid"] = "test"
    seeds: int = 5
    first_seed: int = 0
    horizon: int | None = None
    eval_every: int | None = None
    smoothing: int = 1
    trials_at_once: int | None = None
    timing_rounds: int = 11

    def check(self) -> None:
        """Raise :class:`UsageError` if a number is not possible."""
        for name, most in LIMITS.items():
            value, least = getattr(self, name), 0 if name == "first_seed" else 1
            flag = f"--{name.replace('_', '-')}"
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise UsageError(f"{flag} must be a whole number, not {shown(value)}")
            if value is not None and not least <= value <= most:
                raise UsageError(f"{flag} must be at least {least} and at most {most}, not {shown(value)}")
        for name, values in (("protocol", ("fair", "paper")), ("split", ("test", "valid"))):
            if getattr(self, name) not in values:
                raise UsageError(f"--{name} must be {' or '.join(values)}, not {shown(getattr(self, name))}")
        known = [baseline.name for baseline in BASELINES]
        for name in self.baseline:
            if name not in known:
                raise UsageError(f"--baseline {shown(name)}: there are {', '.join(known)}")
        if self.baseline and self.protocol == "paper":
            raise UsageError("--baseline is for --protocol fair: the paper's is Adam")

    def make_protocol(self) -> Fair | Paper:
        """The protocol with its settings."""
        at_once = {"at_once": self.trials_at_once} if self.trials_at_once else {}
        if self.protocol == "paper":
            return Paper(**at_once)
        return Fair(tuple(b for b in BASELINES if not self.baseline or b.name in self.baseline), **at_once)


@dataclass(frozen=True)
class Problem:
    """One task on which optimizers are evaluated, checked and ready to go."""

    config: EvaluationConfig
    protocol: Fair | Paper
    task: Task  # its horizon and its test split as the configuration wants them
    candidates: list[Candidate]
    settings: dict[str, Any]  # what the results depend on beside the optimizers
    results: Results
    out: Path


def prepare(
    task: Task,
    optimizers: Sequence[str] | Mapping[str, str | optax.GradientTransformation],
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
    _check(task)
    task = measured_on(replace(task, horizon=config.horizon or task.horizon), config.split)
    eval_every = config.eval_every or protocol.default_eval_every(task.horizon)
    if task.horizon % eval_every:
        raise UsageError(f"--eval-every {eval_every} does not divide the horizon of {task.horizon} steps")
    optional = {
        "protocol": config.protocol if config.protocol != "paper" else None,
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
    by = config.make_protocol()
    candidates = find_candidates(optimizers, task, by.names)
    return Problem(config, by, task, candidates, settings, Results(out / "results", settings), out)


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
        report: everything, a JSON value.
        figure: the test-loss curves.
        files: what was written.
    """

    report: dict[str, Any]
    figure: Figure
    files: list[Path]


def evaluate(problem: Problem) -> Evaluation:
    """Evaluate the optimizers, and write the report."""
    task, settings, out, by = problem.task, problem.settings, problem.out, problem.protocol
    runs = Runs(task, settings["seeds"], settings["eval_every"], problem.results)
    tuned = by.tune(runs, settings["smoothing"])
    own = runs.train({f"optimizer {candidate.name}": candidate for candidate in problem.candidates})
    everyone = [*tuned.candidates, *problem.candidates]
    timing, others = time_steps(problem, everyone), list(zip(problem.candidates, own))
    report = build_report(settings, _environment(), by, tuned, others, timing)

    pictures, title, baselines = ["curves.png"], task_title(settings), len(tuned.candidates)
    named = dict(zip((candidate.name for candidate in everyone), [*tuned.curves, *own]))
    steps = protocol.evaluation_steps(task.horizon, settings["eval_every"])
    _, goal = by.goal([protocol.smooth(each.test_loss, settings["smoothing"]) for each in tuned.curves], steps)
    figure = plots.draw_curves(title, steps, settings["smoothing"], named, baselines, goal_of(report), goal.loss)
    figure.savefig(out / "curves.png", bbox_inches="tight")
    if weights(task) == 2:
        pictures.append("trajectories.png")
        plots.plot_trajectories(out / "trajectories.png", title, _loss_at(task), settings["seeds"], named, baselines)
    write_atomically(out / "report.json", json.dumps(report, indent=1, allow_nan=False).encode())
    write_atomically(out / "report.md", markdown(report, pictures).encode())
    return Evaluation(report, figure, [out / name for name in ("report.json", "report.md", *pictures)])


def time_steps(problem: Problem, everyone: Sequence[Candidate]) -> Timing:
    """The time per step of all in turn in one run: if one is new or has changed, all are measured again."""
    rounds = problem.config.timing_rounds
    fingerprint = " ".join([f"{rounds} rounds", *(candidate.fingerprint for candidate in everyone)])
    timed = problem.results.load("timing", fingerprint)
    if timed is None:
        on_one_core = jax.default_backend() == "cpu" and weights(problem.task) < SMALL
        with progress(rounds * len(everyone), "time per step", "rounds") as bar:
            timing = time_per_step(problem.task, everyone, rounds=rounds, on_one_core=on_one_core, progress=bar.update)
        timed = {name: np.asarray(value) for name, value in timing._asdict().items()}
        problem.results.save("timing", fingerprint, timed)
    return Timing(timed["seconds"], bool(timed["one_core"]), float(timed["waiting"]))


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


def _check(task: Task) -> None:
    """Trace the task on its data, so that what is wrong with it shows in one line."""
    for name in ("train", "valid", "test"):
        leaves = jax.tree.leaves(task.data.get(name))
        if not leaves or any(np.ndim(leaf) == 0 for leaf in leaves):
            raise UsageError(f"task {task.name}: data[{name!r}] must be arrays with the examples along the first axis")
        if not len(leaves[0]):
            raise UsageError(f"task {task.name}: data[{name!r}] has no examples")
    key = jax.random.key(0)
    try:
        params = jax.eval_shape(task.init, key)
        batch = jax.eval_shape(task.sample, key, task.data["train"])
        losses = [jax.eval_shape(task.loss, params, examples) for examples in (batch, task.data["test"])]
    except Exception as error:  # whatever a function of a user raises
        raise UsageError(f"task {task.name}: {type(error).__name__}: {first_line(error)}") from None
    for loss in losses:
        if getattr(loss, "shape", None) != ():
            raise UsageError(f"task {task.name}: the loss must be a scalar, not {loss}")


def _file_digest(task: Task, files: Sequence[Path]) -> str:
    """A digest of the files that a task is made of, and of those that its functions come from."""
    functions = [_source_file(function) for function in (task.init, task.loss, task.sample)]
    own = [file.resolve() for file in files]
    others = sorted({file for file in functions if file} - set(own))
    parts = [file.read_bytes() for file in (*own, *others)]
    if None in functions:
        parts.append(_traced(task).encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _source_file(function: Callable[..., Any]) -> Path | None:
    """The file that a function comes from; None where there is none, as for what was typed into a notebook."""
    try:
        file = Path(str(inspect.getsourcefile(inspect.unwrap(function))))
    except TypeError:  # an object that can be called
        return None
    return file.resolve() if file.is_file() else None


def _traced(task: Task) -> str:
    """What a task's functions compute, without addresses in memory."""
    key, train = jax.random.key(0), task.data["train"]
    params, batch = jax.eval_shape(task.init, key), jax.eval_shape(task.sample, key, train)
    calls: list[tuple[Callable[..., Any], tuple]] = [
        (task.init, (key,)),
        (task.loss, (params, batch)),
        (task.sample, (key, train)),
    ]
    return re.sub("0x[0-9a-f]+", "", "\n".join(str(jax.make_jaxpr(function)(*args)) for function, args in calls))


def _environment() -> dict[str, str]:
    packages = ("gmn_lopt", "jax", "jaxlib", "flax", "optax", "numpy")
    return {package: importlib.metadata.version(package) for package in packages} | {
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].platform}, {jax.devices()[0].device_kind}",
        "machine": describe_hardware(),
    }
