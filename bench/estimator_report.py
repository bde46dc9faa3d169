"""The report of bench/estimators.py: a markdown table for each budget, and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gmn_lopt.evaluation import protocol
from gmn_lopt.evaluation.plots import COLOURS
from gmn_lopt.evaluation.report import markdown_table, spread
from gmn_lopt.util.files import write_atomically

Arrays = Mapping[str, np.ndarray]
BUDGETS = ("equal inner steps", "equal time")
BINS = 60  # of a curve in the pictures
HEAD = ("variant", "meta-loss", "best test loss", "step reduction", "misses", "inner steps", "seconds", "compile (s)")
ABOUT = (
    "*Meta-loss*: mean training loss along the trajectory, at the resulting meta-parameters, on the evaluation's "
    "seeds. *Step reduction*: how many times fewer steps than tuned Adam to Adam's best test loss; mean over the "
    "evaluation's seeds without the misses (those that never reach it), then mean and deviation over meta-seeds. "
    "*Seconds* are of meta-training, without compilation, whose largest time over the seeds is given."
)


def write_report(
    path: Path, about: str, results: Mapping[str, tuple[int, Arrays, Mapping[str, Sequence[Arrays]]]]
) -> str:
    """Write ``report.md`` and a picture for each task; returns the text.

    Args:
        path: directory.
        about: what was compared, a line for the top of the report.
        results: for each task the horizon, Adam's grid and the variants' finished runs, one for each meta-seed.
    """
    text = ["# Estimators of the meta-gradient", about, ABOUT]
    for task, (horizon, baseline, variants) in results.items():
        text.append(f"## {task}, {horizon} steps")
        for budget, name in enumerate(BUDGETS):
            text += [f"### At {name}", table(horizon, baseline, variants, budget)]
        if variants:
            plot(path / f"{task}.png", task, variants)
            text.append(f"![meta-loss]({task}.png)")
    written = "\n\n".join(text) + "\n"
    write_atomically(path / "report.md", written.encode())
    return written


def table(horizon: int, baseline: Arrays, variants: Mapping[str, Sequence[Arrays]], budget: int) -> str:
    """The results of one task at one budget, an index in :data:`BUDGETS`."""
    steps = protocol.evaluation_steps(horizon, protocol.default_eval_every(horizon))
    grid = protocol.smooth(baseline["test_loss"], 1)
    best = protocol.best_setting(grid)
    goal = protocol.target(grid[best], steps)
    losses = [f"{x.mean():.4f}" for x in (baseline["train_loss"][best], goal.loss)]
    rows = [[f"tuned Adam ({protocol.LEARNING_RATES[best]:g})", *losses, "1", "", "", "", ""]]
    for name, runs in variants.items():
        curves = [protocol.smooth(run["test_loss"][budget], 1) for run in runs]
        factors = np.array([protocol.step_reduction(curve, steps, goal) for curve in curves])
        # Of each meta-seed over the evaluation seeds that did not miss; the misses are in a column of their own.
        means = [protocol.mean_and_std(row)[0] for row in factors]
        ends = [int(run["snapshots"][budget]) - 1 for run in runs]
        spent = [np.mean([run[key][end] for run, end in zip(runs, ends)]) for key in ("inner_steps", "seconds")]
        rows.append(
            [
                name,
                _spread([run["train_loss"][budget].mean() for run in runs], 4),
                _spread([curve.min(axis=1).mean() for curve in curves], 4),
                _spread([np.nan if mean is None else mean for mean in means], 2),
                f"{np.isnan(factors).sum()}/{factors.size}",
                *(f"{each:,.0f}" for each in spent),
                f"{max(float(run['compile_seconds']) for run in runs):.0f}",
            ]
        )
    return markdown_table(HEAD, rows)


def plot(file: Path, title: str, variants: Mapping[str, Sequence[Arrays]]) -> None:
    """Draw the meta-loss of the truncations against inner steps and against seconds: means and ranges over seeds.

    The first episodes of all unrolls are of staggered lengths: until one horizon has passed, early training is
    over-represented, and the loss falls for that reason too.
    """
    figure = Figure(figsize=(12, 5), layout="constrained", dpi=130)
    for axes, column in zip(figure.subplots(1, 2), ("inner_steps", "seconds")):
        for i, (name, runs) in enumerate(variants.items()):
            edges = np.linspace(0, max(run[column][-1] for run in runs), BINS + 1)
            curves = np.array([_binned(run[column], run["loss"], edges) for run in runs])
            seen = np.isfinite(curves).any(axis=0)
            x, shown = ((edges[1:] + edges[:-1]) / 2)[seen], curves[:, seen]
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": ("-", "--", ":")[i // len(COLOURS) % 3]}
            axes.plot(x, np.nanmean(shown, axis=0), linewidth=1.5, label=name, **style)
            low, high = np.nanmin(shown, axis=0), np.nanmax(shown, axis=0)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.set(xlabel=column.replace("_", " "), ylabel="meta-loss of the truncations", yscale="log")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(title)
    figure.savefig(file)


def _spread(values: Sequence[float], digits: int) -> str:
    if np.isinf(values).any():
        return "diverged"
    return spread(dict(zip(("mean", "std"), protocol.mean_and_std(np.asarray(values, float)))), digits)


def _binned(x: np.ndarray, y: np.ndarray, edges: np.ndarray) -> np.ndarray:
    which = np.clip(np.searchsorted(edges, x) - 1, 0, len(edges) - 2)
    totals = np.bincount(which, y, len(edges) - 1)
    counts = np.bincount(which, minlength=len(edges) - 1)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)
