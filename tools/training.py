"""What a card says about a training run, read from its directory."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from gmn_lopt.meta.config import from_json, make_stages, to_json
from gmn_lopt.meta.run_directory import RunError, read_settings
from gmn_lopt.util.errors import first_line
from gmn_lopt.util.hardware import describe_hardware
from meta_train import make_problem
from tools.commands import OF_THE_MACHINE, continue_command, train_command


def training_facts(run: Path, name: str, hardware: str | None = None) -> dict[str, Any]:
    """Read what has been trained in a run directory, up to its latest checkpoint.

    Args:
        run: the directory, of a run of ``meta_train.py``, complete or not.
        name: the name that the optimizer ships with.
        hardware: what it was trained on; default: what the run says, else that of this machine.

    Returns:
        The entry ``training`` of a card, JSON values. ``seconds`` is None where the run was too short to tell.

    Raises:
        RunError, UsageError: in one line, what is missing or not readable.
    """
    settings = read_settings(run)
    config = from_json(settings)
    settings = to_json(config)  # with the defaults of settings that came later
    try:
        versions = dict(json.loads((run / "config.json").read_text())["versions"])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        checkpoints = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"--run {run} is not a run of meta_train.py that can be read: {first_line(error)}") from None
    if not checkpoints:
        raise RunError(f"--run {run} has no checkpoint yet: let it run longer")
    done = max(checkpoints)
    rows = [row for row in rows if row["meta_step"] <= done]
    recorded = versions.pop("hardware", None)

    stages = make_stages(config)
    _, problem = make_problem(config)
    inner_steps = [stage.meta_step(problem, config.meta_clip).inner_steps for stage in stages]
    ends = [sum(stage.meta_steps for stage in stages[: i + 1]) for i in range(len(stages))]
    left = [max(0, min(stage.meta_steps, done - end + stage.meta_steps)) for stage, end in zip(stages, ends)]
    return {
        "tasks": [task.strip() for task in config.task.split(",")],
        "meta_steps": done,
        "inner_steps": sum(count * steps for count, steps in zip(left, inner_steps)),
        "horizon": problem.horizon,
        "seconds": training_seconds(rows, inner_steps),
        "hardware": hardware or recorded or describe_hardware(),
        "seeds": [config.seed],
        "stages": [
            {**asdict(stage), "meta_steps_done": count, "inner_steps_per_meta_step": steps}
            for stage, count, steps in zip(stages, left, inner_steps)
        ],
        "recipe": {key: value for key, value in settings.items() if key not in OF_THE_MACHINE},
        "last_metrics": {key: value for key, value in rows[-1].items() if key != "window_loss"} if rows else {},
        "versions": versions,
        "commands": {
            "train": train_command(settings, f"runs/{name}"),
            "continue": continue_command(settings, name),
        },
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
