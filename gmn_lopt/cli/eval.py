"""Evaluate optimizers against tuned and scheduled baselines on a task.

gmn-eval --task digits_mlp --optimizer runs/digits --optimizer optax:lion:learning_rate=3e-4 --out report/

AdamW, NAdamW, Muon, SOAP and PSGD-Kron, each with a warm-up and a cosine to zero, are tuned by validation loss, all
with the same number of trials. Then every optimizer trains from the same initialisations on the same batches. The
report says at which test loss each ends, and when it is at the best baseline's. Interrupt it at any time: the same
command goes on where it stopped.

Other horizons and batch sizes, and transfer to other tasks, are measured in the same command:
gmn-eval --task cifar10_mlp --optimizer default --transfer cifar10_mlp:horizon=500,batch_size=16 --transfer cifar100_mlp
"""

import importlib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from gmn_lopt.cli.command_line import interrupted_with, one_line_for_the_machine, parse
from gmn_lopt.evaluation.evaluate import EvaluationConfig, Problem, evaluate, prepare
from gmn_lopt.evaluation.report import table, transfer_table
from gmn_lopt.tasks import TASK_ERRORS, load_task, task_module
from gmn_lopt.util.checks import path
from gmn_lopt.util.compilation_cache import keep_compiled
from gmn_lopt.util.errors import UsageError, first_line
from gmn_lopt.util.files import write_atomically
from gmn_lopt.util.spec import parse_spec
from gmn_lopt.util.threads import one_blas_thread


@dataclass(frozen=True, kw_only=True)
class Config(EvaluationConfig):
    """What to evaluate, and how.

    Attributes:
        task: NAME or NAME:setting=value,setting=value, such as cifar10_mlp:hidden=64. The name of a file in tasks/,
            without .py, or package.module:make; the settings are the arguments of make(). Or
            learned_optimization:MODULE:NAME, a task of google/learned_optimization.
        out: Directory for report.json, report.md, the pictures, and results/ (what an evaluation resumes from).
        optimizer: An optimizer to compare with the baselines; repeat the flag for several. A run directory of
            gmn-meta-train, a directory saved by gmn_lopt.save, the name of a shipped optimizer, or
            optax:NAME:setting=value,setting=value (any optimizer of optax, as in optax:lion:learning_rate=3e-4), or
            learned_optimization:MODULE:NAME:setting=value (one of google/learned_optimization).
            Learned optimizers take total_steps, learning_rate and weight_decay alike, default:total_steps=2000. LABEL=
            in front of it sets its name in the report.
        transfer: Another task on which to evaluate the same optimizers, written like --task; repeat the flag for
            several. Each gets a report of its own in the directory transfer/ of the report, and transfer.md puts them
            side by side.
        data_dir: Directory of data sets and their caches; default: the task's own.
    """

    task: str
    out: Path
    optimizer: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    transfer: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    baseline: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    data_dir: str | None = None

    def check(self) -> None:
        """Raise :class:`UsageError` if a number or a path is not possible."""
        super().check()
        try:
            path(self, "out", "data_dir")
        except ValueError as error:
            raise UsageError(first_line(error)) from None


def main(config: Config) -> dict[str, Any]:
    """Run the evaluation, write the reports, print the tables; returns the report on ``--task``.

    Raises:
        UsageError: in one line, if it cannot be done.
    """
    config.check()
    name, settings = parse_task("--task", config.task)
    places = {config.out: ("--task", name, settings)}
    for spec in config.transfer:
        name, settings = parse_task("--transfer", spec)
        key = name + "".join(f",{setting}={value}" for setting, value in settings.items()).replace(" ", "")
        place = config.out / "transfer" / re.sub(r"[^\w.,=+-]", "-", key)
        if place in places:
            raise UsageError(f"--transfer {spec!r}: give each task once")
        places[place] = ("--transfer", name, settings)
    # What is wrong shows before anything runs.
    problems = [problem_of(config, out, *task) for out, task in places.items()]
    reports = []
    for problem in problems:
        report, _, files = evaluate(problem)
        reports.append(report)
        print(table(report))
        print("wrote " + ", ".join(map(str, files)))
    if config.transfer:
        summary = transfer_table(reports)
        write_atomically(config.out / "transfer.md", f"# Transfer\n\n{summary}\n".encode())
        print(f"{summary}\nwrote {config.out / 'transfer.md'}")
    return reports[0]


def parse_task(flag: str, spec: str) -> tuple[str, dict[str, Any]]:
    """The name and the settings of a task; raises :class:`UsageError` if it is not written in this form."""
    try:
        return parse_spec(spec)
    except ValueError as error:
        raise UsageError(f"{flag} {error}") from None


def problem_of(config: Config, out: Path, flag: str, name: str, settings: Mapping[str, Any]) -> Problem:
    """The evaluation on one task, with a directory of its own; a :class:`UsageError` says if it cannot be made."""
    try:
        task = load_task(name, config.data_dir, **settings)
    except TASK_ERRORS as error:
        raise UsageError(f"{flag} {name}: {first_line(error)}") from None
    return prepare(task, config.optimizer, out, config, settings, [task_file(name)])


def task_file(name: str) -> Path:
    """The file in which a task is made."""
    return Path(str(inspect.getsourcefile(importlib.import_module(task_module(name)))))


def cli(args: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    config = parse(Config, __doc__, args)
    one_blas_thread()
    keep_compiled()
    interrupted = f"gmn-eval: interrupted; the same command goes on from what is in {config.out}"
    try:
        with interrupted_with(interrupted), one_line_for_the_machine():
            main(config)
    except UsageError as error:
        print(f"gmn-eval: {error}", file=sys.stderr)
        return 2
    return 0
