"""Report what has been trained: ``python -m experiments.curvature.report [--out runs/curvature]``.

Prints a table of the test losses, writes it to ``OUT/report.md``, and draws ``OUT/fisher.png``: test loss against the
number of networks to train on, the mean over seeds with bands from the lowest to the highest.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.curvature.models import MODELS, OURS
from gmn_lopt.cli.command_line import one_line_for_the_machine, parse
from gmn_lopt.evaluation.plots import COLOURS, MARKERS
from gmn_lopt.util.errors import FileError, UsageError, first_line
from gmn_lopt.util.files import read_json, write_atomically

FIELDS = {"model": str, "size": int, "seed": int, "weights": int, "test": float, "standard": float}


@dataclass(frozen=True)
class Config:
    """What to report."""

    out: Path = Path("runs/curvature")
    """Directory of the results, of experiments.curvature.train."""


def read(out: Path) -> list[dict[str, Any]]:
    """All results.

    Raises:
        UsageError: there are none.
        FileError: in one line, a file is not one.
    """
    found = []
    for file in sorted((out / "results").glob("*.json")):
        result = read_json(file)
        if bad := [name for name, kind in FIELDS.items() if type(result.get(name)) is not kind]:
            raise FileError(f"{file} is damaged: {bad[0]} is not there; remove it, and train again")
        found.append(result)
    if not found:
        raise UsageError(f"{out} holds no results: run python -m experiments.curvature.train")
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each method, a column for each number of networks to train on.

    A cell is the mean over seeds of the test loss, and how much it is below the standard estimator's on the same test
    set, in per cent; of several seeds with their standard deviation.
    """
    sizes = sorted({r["size"] for r in results})
    names = [m for m in MODELS if any(r["model"] == m for r in results)]
    seeds = sorted({r["seed"] for r in results})
    head = ["method", "weights", *(f"{size} networks" for size in sizes)]
    rows = [["standard estimator", "0", *(_standard(results, size) for size in sizes)]]
    for name in names:
        own = [r for r in results if r["model"] == name]
        shown = f"{name} (ours)" if name in OURS else name
        rows.append([shown, f"{own[0]['weights']:,}", *(_cell([r for r in own if r["size"] == s]) for s in sizes)])
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    note = f"Test loss, in units of the target's variance; below the standard estimator's in per cent; seeds {seeds}."
    return "\n".join([*lines, "", note])


def _standard(results: Sequence[dict[str, Any]], size: int) -> str:
    losses = [r["standard"] for r in results if r["size"] == size]
    return f"{np.mean(losses):.4g}"


def _cell(results: Sequence[dict[str, Any]]) -> str:
    if not results:
        return ""
    losses = [r["test"] for r in results]
    better = [100 * (1 - r["test"] / r["standard"]) for r in results]
    spread = f" ± {np.std(better):.1f}" if len(better) > 1 else ""
    return f"{np.mean(losses):.4g} ({np.mean(better):+.1f}{spread} %)"


def plot(file: Path, results: Sequence[dict[str, Any]]) -> None:
    """Draw the test loss of each method over the number of networks to train on."""
    figure = Figure(figsize=(8.6, 5.6), layout="constrained", dpi=150)
    axes = figure.subplots()
    standard = np.mean([r["standard"] for r in results])
    axes.axhline(standard, color=COLOURS[0], linewidth=1.6, linestyle=(0, (5, 4)), label="standard estimator")
    for i, name in enumerate(m for m in MODELS if any(r["model"] == m for r in results)):
        own = [r for r in results if r["model"] == name]
        sizes = sorted({r["size"] for r in own})
        losses = [[r["test"] for r in own if r["size"] == size] for size in sizes]
        style: Any = {
            "color": COLOURS[1 + i % (len(COLOURS) - 1)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 5,
        }
        line = "dashed" if name in OURS else "solid"
        label = f"{name} (ours)" if name in OURS else name
        axes.plot(sizes, [np.mean(x) for x in losses], linewidth=1.6, linestyle=line, label=label, **style)
        axes.fill_between(
            sizes, [min(x) for x in losses], [max(x) for x in losses], color=style["color"], alpha=0.16, linewidth=0
        )
    axes.set(xscale="log", yscale="log", xlabel="networks to train on", ylabel="test loss (1: the target's variance)")
    axes.set_title("The diagonal of the Fisher matrix from the gradients of a few examples")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    seeds = len({r["seed"] for r in results})
    note = f"mean over {seeds} seed{'s' * (seeds != 1)}; bands: lowest to highest"
    figure.text(0.995, -0.005, note, ha="right", va="top", fontsize=7.5, color="#666666")
    figure.savefig(file, bbox_inches="tight")


def main(config: Config) -> str:
    """Print the table, and write it and the plot; returns the table.

    Raises:
        UsageError, FileError: in one line, what is wrong.
    """
    results = read(config.out)
    text = table(results)
    print(text)
    write_atomically(config.out / "report.md", f"{text}\n".encode())
    plot(config.out / "fisher.png", results)
    return text


if __name__ == "__main__":
    try:
        with one_line_for_the_machine():
            main(parse(Config, __doc__))
    except (UsageError, FileError) as error:
        sys.exit(f"experiments.curvature.report: {first_line(error)}")
