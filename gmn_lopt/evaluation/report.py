"""The report of an evaluation: everything as one JSON document, and a readable summary of it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from gmn_lopt.evaluation import protocol
from gmn_lopt.evaluation.timing import Timing
from gmn_lopt.evaluation.training import Candidate, Curves

BUSY = 0.1
"""The part of the time spent waiting for a processor from which a machine was busy, so that times are uncertain."""
MEASURES = {
    "step_reduction": ("step reduction", 2),
    "training_time_speed_up": ("training-time speed-up", 2),
    "best_test_loss": ("best test loss", 4),
    "final_test_loss": ("final test loss", 4),
    "mean_training_loss": ("mean training loss", 4),
}
"""What is measured of an optimizer on each seed: its title and digits in the table."""


def build_report(
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    grid_curves: Float[np.ndarray, "H S E"],
    candidates: Sequence[Candidate],
    curves: Sequence[Curves],
    timing: Timing,
) -> dict[str, Any]:
    """Carry out the protocol on measured curves.

    Args:
        settings: the evaluation's settings, with ``seeds`` (in the order of the curves' rows), ``horizon`` and
            ``eval_every`` (steps), ``smoothing`` (evaluations).
        environment: versions and device.
        grid_curves: Adam's test losses for ``protocol.LEARNING_RATES``, not smoothed.
        candidates: the optimizers; the first one is tuned Adam, the baseline.
        curves: of each optimizer.
        timing: of all optimizers.

    Returns:
        A JSON value; numbers that are not finite are None.
    """
    seeds, window = settings["seeds"], settings["smoothing"]
    steps = protocol.evaluation_steps(settings["horizon"], settings["eval_every"])
    grid = protocol.smooth(grid_curves, window)
    chosen = protocol.best_setting(grid)
    goal = protocol.target(protocol.smooth(curves[0].test_loss, window), steps)
    medians = np.median(timing.seconds, axis=1)

    rows = []
    for candidate, own, rounds, seconds in zip(candidates, curves, timing.seconds, medians):
        smoothed = protocol.smooth(own.test_loss, window)
        first = protocol.first_steps(smoothed, steps, goal.loss)
        factor = protocol.step_reduction(smoothed, steps, goal)
        measures = {
            "step_reduction": factor,
            "training_time_speed_up": factor * medians[0] / seconds,
            "best_test_loss": smoothed.min(axis=1),
            "final_test_loss": smoothed[:, -1],
            "mean_training_loss": own.train_loss.mean(axis=1),
        }
        spreads = {key: protocol.mean_and_std(values) for key, values in measures.items()}
        for key, values in measures.items():
            # A mean over the seeds that did not diverge would flatter; only of the factors are misses told apart.
            if key.endswith("loss") and not np.isfinite(values).all():
                spreads[key] = {"mean": None, "std": None}
        rows.append(
            {
                "name": candidate.name,
                "source": candidate.source,
                **({"digest": candidate.digest} if candidate.digest else {}),
                "hits": int(np.isfinite(first).sum()),
                "misses": int(np.isnan(first).sum()),
                **spreads,
                "seconds_per_step": {"median": float(seconds), "rounds": rounds.tolist()},
                "seeds": [
                    {"seed": seed, "miss": bool(np.isnan(step)), "first_step": None if np.isnan(step) else int(step)}
                    | {key: float(values[i]) for key, values in measures.items()}
                    for i, (seed, step) in enumerate(zip(seeds, first))
                ],
            }
        )
    report = {
        "settings": dict(settings),
        "environment": dict(environment),
        "baseline": {
            "name": candidates[0].name,
            "learning_rate": protocol.LEARNING_RATES[chosen],
            "at_edge_of_grid": chosen in (0, len(protocol.LEARNING_RATES) - 1),
            "seeds": [
                {"seed": seed, "best_test_loss": float(loss), "step": int(step)}
                for seed, loss, step in zip(seeds, goal.loss, goal.step)
            ],
            "grid": [
                {"learning_rate": rate, "best_test_loss_mean": float(best.mean()), "best_test_loss": best.tolist()}
                for rate, best in zip(protocol.LEARNING_RATES, grid.min(axis=2))
            ],
        },
        "timing": {"one_core": timing.one_core, "waiting": timing.waiting, "busy": timing.waiting > BUSY},
        "optimizers": rows,
        "curves": {
            "steps": steps.tolist(),
            "test_loss": {candidate.name: own.test_loss.tolist() for candidate, own in zip(candidates, curves)},
            "training_loss": {candidate.name: own.train_loss.tolist() for candidate, own in zip(candidates, curves)},
        },
    }
    return _finite(report)


def task_title(settings: Mapping[str, Any]) -> str:
    """The name of the task, with those of its own settings that were not left as they are."""
    values = settings.get("task_settings", {}).items()
    changed = [f"{key}={'x'.join(map(str, x)) if isinstance(x, list | tuple) else x}" for key, x in values]
    details = f" ({', '.join(changed)})" if changed else ""
    split = f" on the {settings['split']} split" if "split" in settings else ""
    return f"{settings['task']}{details}{split}"


def table(report: Mapping[str, Any]) -> str:
    """The main table: one line per optimizer; a footnote if the machine was busy."""
    lines = []
    for row in report["optimizers"]:
        cells = [spread(row[key], n) + _misses(row) * (not key.endswith("loss")) for key, (_, n) in MEASURES.items()]
        lines.append([row["name"], *cells, f"{row['seconds_per_step']['median'] * 1e3:.3f} ms"])
    text = markdown_table(["optimizer", *(title for title, _ in MEASURES.values()), "time per step"], lines)
    timing = report["timing"]
    if timing["busy"]:
        text += (
            f"\n\nThe machine was busy while steps were timed ({timing['waiting']:.0%} of the time went by waiting for "
            "a processor): times per step and training-time speed-ups are uncertain."
        )
    return text


def transfer_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """The step reduction of the same optimizers, in the same order, on several tasks: one report for each."""
    lines = []
    for report in reports:
        cells = [spread(row["step_reduction"], 2) + _misses(row) for row in report["optimizers"][1:]]
        lines.append([task_title(report["settings"]), f"{report['baseline']['learning_rate']:g}", *cells])
    names = [row["name"] for row in reports[0]["optimizers"][1:]]
    return markdown_table(["step reduction on", "Adam's rate", *names], lines)


def markdown(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The readable form of what :func:`build_report` returns, with pictures that lie beside it."""
    settings, baseline, rows = report["settings"], report["baseline"], report["optimizers"]
    per_seed = [
        [str(seed["seed"]), f"{seed['best_test_loss']:.4f}", str(seed["step"])]
        + [_factor_and_step(row["seeds"][i]) for row in rows[1:]]
        for i, seed in enumerate(baseline["seeds"])
    ]
    grid = [
        [
            f"{point['learning_rate']:.4f}",
            spread({"mean": point["best_test_loss_mean"], "std": None}, 4),
            "chosen" * (point["learning_rate"] == baseline["learning_rate"]),
        ]
        for point in baseline["grid"]
    ]
    sections = [
        f"# {task_title(settings)}: learned optimizers against tuned Adam",
        table(report),
        f"Mean ± sample standard deviation over {len(per_seed)} seed{'s' * (len(per_seed) != 1)}. "
        "*Step reduction*: the step at which tuned Adam has its best test loss `L*`, divided by the first step at "
        "which the optimizer's test loss is at most `L*`, for each seed. A seed on which it never is within the "
        "horizon is a miss: it has no factor, so mean and deviation are over the other seeds. "
        "*Training-time speed-up*: step reduction times (Adam's time per step / the optimizer's).",
        *(f"![{picture.rsplit('.', 1)[0]}]({picture})" for picture in pictures),
        "## Protocol",
        _protocol(report),
        "## Seeds",
        markdown_table(
            ["seed", "Adam's `L*`", "at step", *(f"{row['name']}: factor (at step)" for row in rows[1:])], per_seed
        ),
        "## Adam's learning rates",
        markdown_table(["learning rate", "mean best test loss", ""], grid),
        "## Optimizers",
        markdown_table(["name", "source"], [[row["name"], f"`{row['source']}`"] for row in rows]),
        "## Environment",
        _items([f"{key}: {value}" for key, value in report["environment"].items()]),
    ]
    return "\n\n".join(sections) + "\n"


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


def _protocol(report: Mapping[str, Any]) -> str:
    settings, baseline = report["settings"], report["baseline"]
    every, smoothing, cap = settings["eval_every"], settings["smoothing"], settings["loss_cap"]
    split = f"the {settings.get('split', 'test')} split"
    examples = f"all {settings['test_examples']} examples of {split}"
    if "test_subset" in settings:
        examples = f"{settings['test_subset']}, a fixed part of {split} evenly spaced over it,"
    smoothed = "Test losses are not smoothed."
    if smoothing > 1:
        smoothed = (
            f"All test losses, the baseline's too, are smoothed by a trailing running mean over {smoothing} "
            f"evaluations ({smoothing * every} steps)."
        )
    edge = " **This is the edge of the grid: Adam might do better beyond it.**" if baseline["at_edge_of_grid"] else ""
    capped = "" if cap is None else f" Training losses above {cap:g} or not finite count as {cap:g}."
    rounds = len(report["optimizers"][0]["seconds_per_step"]["rounds"])
    lines = [
        f"Horizon {settings['horizon']} steps; test loss on {examples} after every "
        f"{'step' if every == 1 else f'{every} steps'}, so that steps in this report are multiples of {every}.",
        smoothed,
        f"Tuned Adam: learning rate {baseline['learning_rate']:g}, of 0.0005 j for j = 1..20 the one with the best "
        f"mean over seeds of the best test loss.{edge}",
        "Every optimizer trains from the same initialisations on the same batches: both depend on the seed only.",
        f"Test losses that are not finite count as infinite.{capped}",
        "Time per step: one compiled step (gradients, factors where needed, update; the batch is given)"
        f"{' on one core' * report['timing']['one_core']}, median of {rounds} rounds in which all took turns.",
    ]
    return _items(lines)


def _items(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _misses(row: Mapping[str, Any]) -> str:
    return f" ({row['misses']} of {len(row['seeds'])} missed)" if row["misses"] else ""


def _factor_and_step(seed: Mapping[str, Any]) -> str:
    return "miss" if seed["miss"] else f"{seed['step_reduction']:.2f} ({seed['first_step']})"


def _finite(value: Any) -> Any:
    """The JSON value with None for every number that is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
