"""Tables and lists in Markdown, as reports have them."""

from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown with aligned columns."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def spread(value: Mapping[str, float | None], digits: int) -> str:
    """A mean and its standard deviation, with so many digits; a dash where there is no mean."""
    mean, deviation = value["mean"], value["std"]
    if mean is None:
        return "—"
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def items(lines: Sequence[str]) -> str:
    """A list with a dash in front of each item."""
    return "\n".join(f"- {line}" for line in lines)


def misses(row: Mapping[str, Any]) -> str:
    """How many seeds of an optimizer, a row of a report, missed the goal; nothing if none."""
    return f" ({row['misses']} of {len(row['seeds'])} missed)" if row["misses"] else ""


def settings_shown(settings: Mapping[str, Any]) -> str:
    """Settings as they are written behind a name: ``learning_rate=0.1,weight_decay=0``."""
    return ",".join(f"{key}={value:g}" for key, value in settings.items())
