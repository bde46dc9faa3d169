"""Train all tasks with ``default``, untuned, and with tuned and scheduled baselines; print one table.

    python -m experiments.transfer --out runs/transfer
    python -m experiments.transfer --out runs/transfer --task vit --task pinn

An interrupted run goes on from what is in ``--out``. Each task has a report of its own there.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tyro

from experiments.transfer.images import autoencoder, cnn, contrastive, vit
from experiments.transfer.physics import pinn
from experiments.transfer.sequences import language_model, lstm
from experiments.transfer.tables import graph_network, matrix_factorisation, regression
from gmn_lopt.cli.command_line import interrupted_with, one_line_for_the_machine, parse
from gmn_lopt.evaluation import compare
from gmn_lopt.tasks.data.cache import DataError
from gmn_lopt.util.compilation_cache import keep_compiled
from gmn_lopt.util.errors import UsageError
from gmn_lopt.util.files import write_atomically

TASKS = {
    make.__name__: make
    for make in (
        vit,
        cnn,
        lstm,
        pinn,
        graph_network,
        matrix_factorisation,
        contrastive,
        regression,
        autoencoder,
        language_model,
    )
}
"""The tasks by name."""


@dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
        out: Directory for the reports.
        task: A task by name; repeat the flag for several. Default: all.
        baseline: A baseline; repeat the flag for several.
        optimizer: What is evaluated beside default, which knows the number of steps, and which does not.
        seeds: Seeds of each run.
    """

    out: Path = Path("runs/transfer")
    task: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    baseline: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ("adamw", "muon", "soap")
    optimizer: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    seeds: int = 3

    def check(self) -> None:
        """Raise :class:`UsageError` if there is no such task."""
        if unknown := sorted(set(self.task) - set(TASKS)):
            raise UsageError(f"there is no task {unknown[0]!r}; there are {', '.join(TASKS)}")


def row(report: dict[str, Any], baselines: int) -> dict[str, Any]:
    """The line of a task: final test losses of all, and how many times fewer steps to the best baseline's.

    Args:
        report: of :func:`gmn_lopt.evaluation.compare`; its optimizers are the baselines, ours, and others.
        baselines: their number.
    """
    rows = report["optimizers"]
    losses = {each["name"]: _finite(each["final_test_loss"]["mean"]) for each in rows}
    known = rows[baselines]
    factor = None if known["misses"] else report["settings"]["horizon"] / known["steps_to_goal"]["mean"]
    return {"best": report["goal"]["name"], "losses": losses, "factor": factor}


def _finite(mean: float | None) -> float:
    return math.inf if mean is None else mean


def main(config: Config) -> None:
    """Evaluate, and write the table."""
    config.check()
    names = config.task or tuple(TASKS)
    found = {}
    for name in names:
        task = TASKS[name]()
        optimizers = [f"known=default:total_steps={task.horizon}", "default", *config.optimizer]
        settings = {"seeds": config.seeds, "baseline": config.baseline, "timing_rounds": 3}
        report = compare(task, optimizers, config.out / name, **settings).report
        found[name] = row(report, len(config.baseline))
        print(name, found[name], flush=True)
    table = summary(found)
    print(table)
    write_atomically(config.out / "transfer.md", f"# Transfer\n\n{table}\n".encode())


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown, and a line that counts."""
    optimizers: Sequence[str] = list(next(iter(rows.values()))["losses"])
    lines = ["| task | " + " | ".join(optimizers) + " | steps to the best baseline's end, times fewer |"]
    lines.append("|---" * (len(optimizers) + 2) + "|")
    for name, each in rows.items():
        losses = " | ".join(f"{each['losses'][optimizer]:.4g}" for optimizer in optimizers)
        lines.append(f"| {name} | {losses} | {'missed' if each['factor'] is None else format(each['factor'], '.2f')} |")
    ahead = sum(each["losses"]["known"] < each["losses"][each["best"]] for each in rows.values())
    factors = median(each["factor"] or 0.0 for each in rows.values())
    return "\n".join([*lines, "", f"Ahead at the end on {ahead} of {len(rows)}; median of the factors {factors:.2f}."])


def cli(args: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    config = parse(Config, __doc__, args)
    keep_compiled()
    try:
        interrupted = f"experiments.transfer: interrupted; the same command goes on from {config.out}"
        with interrupted_with(interrupted), one_line_for_the_machine():
            main(config)
    except (UsageError, DataError) as error:
        print(f"experiments.transfer: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
