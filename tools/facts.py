"""What a card says about a training run and about evaluations, read from a run directory and from reports."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from gmn_lopt.cli.meta_train import make_problem
from gmn_lopt.evaluation.sources import parse_source
from gmn_lopt.meta.config import from_json, to_json
from gmn_lopt.meta.metrics import read_rows
from gmn_lopt.meta.run_directory import RunError, read_settings
from gmn_lopt.util.errors import FileError, first_line
from gmn_lopt.util.files import read_json
from gmn_lopt.util.hardware import describe_hardware
from tools.commands import OF_THE_MACHINE, continue_command, eval_command, train_command

LARGEST_REPORT = 2**28  # bytes; it has curves


class ShipError(ValueError):
    """An optimizer cannot be shipped as asked. The message is one line."""


def measured(file: Path, name: str, digest: str) -> dict[str, Any]:
    """Read a report's numbers of one optimizer and of tuned Adam.

    Args:
        file: a ``report.json`` of ``gmn-eval --protocol paper``.
        name: the name that the optimizer ships with.
        digest: of its meta-parameters, :func:`gmn_lopt.optimizers.saved.digest`; it finds the optimizer in the report.

    Returns:
        One entry of a card's ``evaluations``, JSON values: everything in the report but the curves and the other
        optimizers. ``optimizers`` has more than one row where it was measured with several settings of its own.

    Raises:
        ShipError: in one line, if the report is not readable, or did not measure these meta-parameters.
    """
    try:
        report = read_json(file, most=LARGEST_REPORT)
        if report["settings"].get("protocol", "paper") != "paper":
            raise ValueError("it is by the fair protocol")
        settings, baseline, (adam, *others) = report["settings"], report["baseline"], report["optimizers"]
        rows = [row for row in others if row.get("digest") == digest]
        rounds = len(adam["seconds_per_step"]["rounds"])
        optimizers = []
        for row in rows:
            _, source, place, _ = parse_source(row["source"])
            source = name + source.removeprefix(place)
            kept = {key: value for key, value in row.items() if key != "digest"}
            optimizers.append({**kept, "source": source, "command": eval_command(settings, source, rounds)})
        found = {"task": settings["task"], "settings": settings, "environment": report["environment"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = "a report.json of gmn-eval --protocol paper"
        raise ShipError(f"--report {file} is not {what}: {first_line(error)}") from None
    if not rows:
        there = ", ".join(f"{row['name']} from {row['source']}" for row in others) or "only Adam"
        raise ShipError(f"--report {file} did not measure these meta-parameters (it has {there}): evaluate them")
    return {**found, "baseline": baseline, "adam": adam, "optimizers": optimizers}


def training_facts(run: Path, name: str, hardware: str | None = None) -> dict[str, Any]:
    """Read what has been trained in a run directory, up to its latest checkpoint.

    Args:
        run: the directory, of a run of ``gmn-meta-train``, complete or not.
        name: the name that the optimizer ships with.
        hardware: what it was trained on; default: what the run says, else that of this machine.

    Returns:
        The entry ``training`` of a card, JSON values. ``seconds`` is None where the run was too short to tell.

    Raises:
        RunError, UsageError: in one line, what is missing or not readable.
    """
    config = replace(from_json(read_settings(run)), out=Path(f"runs/{name}"))
    try:
        versions = dict(read_json(run / "config.json")["versions"])
        checkpoints = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"--run {run} is not a run of gmn-meta-train that can be read: {first_line(error)}") from None
    if not checkpoints:
        raise RunError(f"--run {run} has no checkpoint yet: let it run longer")
    done = max(checkpoints)
    try:
        rows = read_rows(run, done)
    except FileError as error:
        raise RunError(f"--run {run}: {error}") from None
    recorded = versions.pop("hardware", None)

    _, problem = make_problem(config)
    inner_steps = [stage.meta_step(problem).inner_steps for stage in config.stages]
    stages, left = [], done
    for stage, steps in zip(config.stages, inner_steps):
        trained = min(stage.meta_steps, left)
        left -= trained
        stages.append({**asdict(stage), "meta_steps_done": trained, "inner_steps_per_meta_step": steps})
    return {
        "tasks": [config.task],
        "meta_steps": done,
        "inner_steps": sum(stage["meta_steps_done"] * stage["inner_steps_per_meta_step"] for stage in stages),
        "horizon": problem.horizon,
        "seconds": training_seconds(rows, inner_steps),
        "hardware": hardware or recorded or describe_hardware(),
        "seeds": [config.seed],
        "stages": stages,
        "recipe": {key: value for key, value in to_json(config).items() if key not in OF_THE_MACHINE},
        "last_metrics": {key: value for key, value in rows[-1].items() if key != "truncation_loss"} if rows else {},
        "versions": versions,
        "commands": {"train": train_command(config), "continue": continue_command(config, name)},
    }


def training_seconds(rows: Sequence[Mapping[str, Any]], inner_steps: Sequence[int]) -> float | None:
    """The time that the meta-steps took, from the speeds in the metrics; without compiling and saving.

    The metrics have no clock, but each row has the inner steps per second since the row before. A row without a speed
    (the first after compiling) counts at the median speed of its stage.

    Args:
        rows: of ``metrics.jsonl``, in order.
        inner_steps: inner steps of one meta-step of each stage.

    Returns:
        Seconds; None if a stage has no row with a speed.
    """
    speeds: dict[str, list[float]] = {}
    for row in rows:
        speeds.setdefault(row["stage"], []).extend([row["inner_steps_per_second"] or 0.0])
    speeds = {stage: [speed for speed in found if speed > 0] for stage, found in speeds.items()}
    if not rows or not all(speeds.values()):
        return None
    steps = [after - before for before, after in pairwise([0, *(row["meta_step"] for row in rows)])]
    return sum(
        count
        * inner_steps[int(row["stage"].partition("-")[0]) - 1]
        / (row["inner_steps_per_second"] or statistics.median(speeds[row["stage"]]))
        for count, row in zip(steps, rows)
    )
