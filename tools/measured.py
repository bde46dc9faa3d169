"""What a card says about an evaluation, read from a report of ``eval.py``."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gmn_lopt.evaluation.sources import SourceError, split_settings
from gmn_lopt.util.errors import first_line
from tools.commands import eval_command


class ShipError(ValueError):
    """An optimizer cannot be shipped as asked. The message is one line."""


def measured(file: Path, name: str, digest: str, places: Collection[Path], label: str | None = None) -> dict[str, Any]:
    """Read a report's numbers of one optimizer and of tuned Adam.

    Args:
        file: a ``report.json``.
        name: the name that the optimizer ships with.
        digest: of its meta-parameters, :func:`gmn_lopt.optimizers.saved.digest`; it finds the optimizer in the report.
        places: where the optimizer was; they find it in reports of versions that wrote no digests.
        label: its label in the report, where that has to be said.

    Returns:
        One entry of a card's ``evaluations``, JSON values: everything in the report but the curves and the other
        optimizers. ``optimizers`` has more than one row where it was measured with several settings of its own.

    Raises:
        ShipError: in one line, if the report is not readable, or did not measure these meta-parameters.
    """
    try:
        report = json.loads(file.read_text())
        settings, baseline, (adam, *others) = report["settings"], report["baseline"], report["optimizers"]
        rows = [row for row in others if _is(row, name, digest, places, label)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShipError(f"--report {file} is not a report.json of eval.py: {first_line(error)}") from None
    if not rows:
        there = ", ".join(f"{row['name']} from {row['source']}" for row in others) or "only Adam"
        raise ShipError(
            f"--report {file} did not measure these meta-parameters (it has {there}): evaluate them, or name them with "
            "--label if the report is of a version without digests"
        )
    rounds = len(adam["seconds_per_step"]["rounds"])
    optimizers = []
    for row in rows:
        source = name + row["source"].removeprefix(_place(row["source"]))
        kept = {key: value for key, value in row.items() if key != "digest"}
        optimizers.append({**kept, "source": source, "command": eval_command(settings, source, rounds)})
    return {
        "task": settings["task"],
        "settings": settings,
        "environment": report["environment"],
        "baseline": baseline,
        "adam": adam,
        "optimizers": optimizers,
    }


def _is(row: Mapping[str, Any], name: str, digest: str, places: Collection[Path], label: str | None) -> bool:
    if label is not None and row["name"] != label:
        return False
    if "digest" in row:
        return bool(row["digest"] == digest)
    place = _place(row["source"])
    return label is not None or place == name or Path(place).resolve() in places


def _place(source: str) -> str:
    try:
        return split_settings(source)[0]
    except SourceError:
        return source
