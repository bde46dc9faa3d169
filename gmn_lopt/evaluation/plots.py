"""Pictures of an evaluation: test-loss curves, and trajectories of problems with two weights."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from gmn_lopt.evaluation import protocol
from gmn_lopt.evaluation.training import Curves

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f")
GREYS = ("#2b2b2b", "#5c5c5c", "#808080", "#9c9c9c", "#b5b5b5")
MARKERS = "osD^vP*X"
DASHES: Any = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))


def draw_curves(
    title: str,
    steps: Int[np.ndarray, "E"],
    smoothing: int,
    curves: Mapping[str, Curves],
    baselines: int,
    goal: str,
    loss: Float[np.ndarray, "S"],
) -> Figure:
    """Draw the mean test loss of each optimizer with the range over seeds, and where it reaches a loss.

    Args:
        title: what stands above.
        steps: after which the curves are taken.
        smoothing: evaluations over which they are smoothed.
        curves: of each optimizer, the baselines first.
        baselines: how many these are; they are grey.
        goal: what the loss to be reached is, in words.
        loss: the loss to be reached, for each seed.
    """
    losses = [protocol.smooth(own.test_loss, smoothing) for own in curves.values()]
    best, seeds = loss.mean(), len(loss)
    figure = Figure(figsize=(8.6, 5.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    axes.axhline(best, color=GREYS[0], linewidth=1, linestyle=(0, (5, 4)), zorder=1.5)

    for i, (name, curve) in enumerate(zip(curves, losses)):
        colour = _colour(i, baselines)
        shown = np.where(np.isfinite(curve), curve, np.nan)
        mean = shown.mean(axis=0)  # a gap where any seed has diverged
        reached = protocol.first_steps(curve, steps, loss)
        hits = reached[np.isfinite(reached)]
        line: Any = DASHES[i % len(DASHES)] if i < baselines else "-"
        label = f"{name}: {_end(mean)}, {_reaches(hits, seeds)}"
        axes.plot(steps, mean, color=colour, linewidth=1.8, linestyle=line, label=label, zorder=3 + 0.1 * i)
        whole = np.isfinite(mean)
        axes.fill_between(
            steps, shown.min(axis=0), shown.max(axis=0), where=whole, color=colour, alpha=0.16, linewidth=0, zorder=1
        )
        if len(hits):
            spread = [[hits.mean() - hits.min()], [hits.max() - hits.mean()]]
            style: Any = {"markeredgecolor": "white", "markersize": 9, "capsize": 3, "elinewidth": 1.3}
            style |= {"fmt": MARKERS[i % len(MARKERS)], "color": colour, "zorder": 6 + 0.1 * i}
            axes.errorbar(hits.mean(), best, xerr=spread, **style)

    place: Any = {"xycoords": ("axes fraction", "data"), "xytext": (4, -3), "textcoords": "offset points", "va": "top"}
    axes.annotate(f"{goal}: {best:.4g}", (0.0, best), fontsize=8.5, color=GREYS[0], **place)
    low, high = _limits(losses, baselines)
    axes.set_yscale("log" if low > 0 and high > 4 * low else "linear")
    axes.set(xlim=(0, steps[-1]), ylim=(low, high), xlabel="training step", title=title)
    if axes.get_yscale() == "log" and high < 1e3 * low:  # few decades: plain numbers at 1, 2 and 5
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("test loss" + (f" (running mean over {smoothing} evaluations)" if smoothing > 1 else ""))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    note = (
        f"mean over {seeds} seed{'s' * (seeds != 1)}, bands: lowest to highest; markers: where an optimizer reaches "
        f"{goal}, mean and range over the seeds that do"
    )
    figure.text(0.995, -0.005, note, ha="right", va="top", fontsize=7.5, color="#666666")
    return figure


def plot_trajectories(
    file: Path,
    title: str,
    loss: Callable[[Float[np.ndarray, "points 2"]], Float[np.ndarray, "points"]],
    seeds: Sequence[int],
    curves: Mapping[str, Curves],
    baselines: int,
) -> None:
    """Draw the two weights' trajectories over the contours of the test loss, one panel for each of up to three seeds.

    The loss is taken at many points at once; ``weights`` of the curves are ``[S, E+1, 2]``, one row for each seed, and
    the first curves are those of so many baselines.
    """
    panels = min(3, len(seeds))
    figure = Figure(figsize=(4.4 * panels + 0.6, 4.7), layout="constrained", dpi=150)
    row = figure.subplots(1, panels, squeeze=False)[0]
    for s, axes in enumerate(row):
        paths = [own.weights[s] for own in curves.values()]
        # The frame holds where the first baseline and the starting point are; what diverges leaves the picture.
        core = np.concatenate([paths[0][np.isfinite(paths[0]).all(axis=1)], np.zeros((1, 2))])
        others = np.concatenate([path[np.isfinite(path).all(axis=1)] for path in paths])
        reach = 2 * np.abs(core).max() + 1e-6
        inside = np.concatenate([core, others[(np.abs(others) < reach).all(axis=1)]])
        centre = (inside.min(axis=0) + inside.max(axis=0)) / 2
        half = 0.6 * np.ptp(inside, axis=0).max() + 1e-6
        x, y = (np.linspace(c - half, c + half, 121) for c in centre)
        grid = np.stack(np.meshgrid(x, y), axis=-1)
        values = loss(grid.reshape(-1, 2)).reshape(grid.shape[:2])
        # Levels at equal steps of the square root of the loss are evenly spaced for a quadratic.
        low, high = np.sqrt(max(values.min(), 0)), np.sqrt(max(values.max(), 0))
        levels = np.linspace(low, high, 18) ** 2 if high > low else None
        axes.contourf(x, y, values, levels=levels, cmap="Greys", alpha=0.35)
        axes.contour(x, y, values, levels=levels, colors="#8a8a8a", linewidths=0.5)
        for i, (name, path) in enumerate(zip(curves, paths)):
            style: Any = {"color": _colour(i, baselines), "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            axes.plot(*path.T, linewidth=1.4, label=name, **style)
        axes.plot(*paths[0][0], "o", color="white", markeredgecolor="black", markersize=8, zorder=5)
        axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xlabel="weight 1", title=f"seed {seeds[s]}")
        axes.set_aspect("equal")
    row[0].set_ylabel("weight 2")
    figure.legend(
        *row[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(curves)), frameon=False
    )
    figure.suptitle(title)
    figure.savefig(file)


def _colour(i: int, baselines: int) -> str:
    return GREYS[i % len(GREYS)] if i < baselines else COLOURS[(i - baselines) % len(COLOURS)]


def _end(mean: Float[np.ndarray, "E"]) -> str:
    return f"ends at {mean[-1]:.4g}" if np.isfinite(mean[-1]) else "diverges"


def _reaches(hits: Float[np.ndarray, "hits"], seeds: int) -> str:
    missed = f", {seeds - len(hits)} of {seeds} missed" if len(hits) < seeds else ""
    return f"there at step {hits.mean():.0f}{missed}" if len(hits) else "never there"


def _limits(curves: Sequence[Float[np.ndarray, "S E"]], baselines: int) -> tuple[float, float]:
    """Limits that show the baselines from a tenth of the training on, and no more of what diverges."""
    finite = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    known = np.concatenate([curve[np.isfinite(curve)] for curve in curves[:baselines]])
    early = np.concatenate([curve[:, curve.shape[1] // 10] for curve in curves[:baselines]])
    top = early.max() if np.isfinite(early).all() else np.median(finite)
    low, high = float(finite.min()), float(max(top, np.median(known)))
    if low > 0 and high > 4 * low:
        return low / 1.12, high * 1.1
    margin = 0.05 * (high - low) + 1e-12
    return low - margin, high + margin
