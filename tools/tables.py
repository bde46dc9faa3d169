"""Write the generated part of docs/pretrained.md from the cards of the shipped optimizers.

python -m tools.tables [--check]
"""

import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmn_lopt.cli.command_line import parse
from gmn_lopt.evaluation.report import task_title
from gmn_lopt.evaluation.tables import spread
from gmn_lopt.optimizers.saved import SHIPPED
from gmn_lopt.optimizers.shipped import CARD_FILE
from gmn_lopt.util.files import read_json, write_atomically

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
WIDTH = 120
NONE_YET = "No pretrained optimizers are shipped yet."
HEAD = (
    "optimizer",
    "task",
    "step reduction",
    "missed seeds",
    "best test loss",
    "tuned Adam's",
    "training-time speed-up",
    "time per step",
    "Adam's",
    "measured on",
)


@dataclass(frozen=True)
class Config:
    """What to do."""

    check: bool = False
    """Write nothing; fail if a file is not up to date with the cards."""


class TableError(ValueError):
    """A file has no place for its generated part."""


def read_cards(root: Path) -> list[dict[str, Any]]:
    """The cards of all optimizers shipped in a checkout, by name."""
    files = (root / "gmn_lopt" / SHIPPED).glob(f"[!.]*/{CARD_FILE}")
    return [read_json(file) for file in sorted(files)]


def evaluations(cards: Sequence[Mapping[str, Any]]) -> str:
    """The table of all evaluations, and the command of each of its rows."""
    found = [(card, entry, row) for card in cards for entry in card["evaluations"] for row in entry["optimizers"]]
    if not found:
        return NONE_YET
    rows = [
        (
            f"`{row['source']}`",
            task_title(entry["settings"]),
            spread(row["step_reduction"], 2),
            f"{row['misses']} of {len(row['seeds'])}",
            spread(row["best_test_loss"], 4),
            spread(entry["adam"]["best_test_loss"], 4),
            spread(row["training_time_speed_up"], 2),
            f"{row['seconds_per_step']['median'] * 1e3:.3f} ms",
            f"{entry['adam']['seconds_per_step']['median'] * 1e3:.3f} ms",
            entry["environment"].get("machine", entry["environment"]["device"]),
        )
        for _, entry, row in found
    ]
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    commands = "\n".join(_command(row["command"]) for _, _, row in found)
    return f"{table}\n\nThe rows, in the same order, come from\n\n```\n{commands}\n```"


def generated(root: Path) -> dict[Path, str]:
    """The files that have a generated part, as they should be.

    Raises:
        TableError: in one line, if a file lacks the markers.
    """
    cards = read_cards(root)
    parts = [evaluations(cards), *map(_recipe, cards)]
    file = root / "docs" / "pretrained.md"
    before, begin, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise TableError(f"{file} lacks {BEGIN} or {END}: put them where the generated part goes")
    text = "\n\n".join(parts)
    return {file: f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"}


def outdated(root: Path) -> list[Path]:
    """The files whose generated part is not what the cards say."""
    return [file for file, text in generated(root).items() if file.read_text(encoding="utf-8") != text]


def write(root: Path) -> list[Path]:
    """Write the generated parts; returns the files that changed."""
    changed = outdated(root)
    for file, text in generated(root).items():
        if file in changed:
            write_atomically(file, text.encode())
    return changed


def _recipe(card: Mapping[str, Any]) -> str:
    training = card["training"]
    seconds = training["seconds"]
    took = "a time that was not recorded" if seconds is None else _duration(seconds)
    versions = ", ".join(f"{name} {version}" for name, version in training["versions"].items())
    return "\n".join(
        [
            f"### {card['name']}",
            "",
            textwrap.fill(
                f"{card['description'].rstrip('.')}. {card['weights']['count']} meta-parameters, {card['licence']}.",
                WIDTH,
                break_on_hyphens=False,
            ),
            "",
            f"- Trained on {', '.join(training['tasks'])}: {training['meta_steps']} meta-steps, "
            f"{training['inner_steps']:,} inner steps, seed {', '.join(map(str, training['seeds']))}.",
            f"- Took {took} on {training['hardware']}, without compiling and saving.",
            f"- Versions: {versions}.",
            "",
            "```",
            _command(training["commands"]["train"]),
            _command(training["commands"]["continue"]),
            "```",
        ]
    )


def _command(command: str) -> str:
    """A command on lines that fit, broken before its flags, or before the value of one that is too long."""
    lines = [""]
    for flag in re.split(r" (?=--)", command):
        fits = len(flag) <= WIDTH - 6
        for part in [flag] if fits else flag.split(" ", 1):
            if len(lines[-1]) + len(part) > WIDTH - 3:
                lines.append("   ")
            lines[-1] = f"{lines[-1]} {part}" if lines[-1] else part
    return " \\\n".join(lines)


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min" if seconds >= 60 else "under 1 min"
    )


def cli(args: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    config = parse(Config, __doc__, args)
    try:
        files = outdated(ROOT) if config.check else write(ROOT)
    except TableError as error:
        print(f"tables.py: {error}", file=sys.stderr)
        return 2
    names = ", ".join(str(file.relative_to(ROOT)) for file in files)
    if config.check and files:
        print(f"tables.py: not up to date with the cards: {names}; run python -m tools.tables", file=sys.stderr)
        return 1
    print(f"wrote {names}" if files else "up to date")
    return 0


if __name__ == "__main__":
    sys.exit(cli())
