"""The report of an evaluation: everything as one JSON document, and a readable summary of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from gmn_lopt.evaluation import protocol

BUSY = 0.1
"""The part of the time spent waiting for a processor from which a machine was busy, so that times are uncertain."""


@dataclass(frozen=True)
class Outcome:
    """What was measured of one optimizer: ``S`` seeds, ``E`` evaluations.

    Attributes:
        name: its label.
        source: where it came from.
        test_loss: loss on the whole test split at each evaluation, not smoothed.
        train_loss: mean (capped) training loss of the steps since the evaluation before.
        seconds_per_step: time of one training step, one value per round of the timing.
        weights: the parameters at the initialisation and at each evaluation; ``P = 0`` if they were not kept.
        digest: of a learned optimizer, the digest of its meta-parameters, by which its report is found again.
    """

    name: str
    source: str
    test_loss: Float[np.ndarray, "S E"]
    train_loss: Float[np.ndarray, "S E"]
    seconds_per_step: Float[np.ndarray, "rounds"]
    weights: Float[np.ndarray, "S E+1 P"]
    digest: str = ""


def build_report(
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    seeds: Sequence[int],
    grid_curves: Float[np.ndarray, "H S E"],
    outcomes: Sequence[Outcome],
    one_core: bool = False,
    waiting: float = 0.0,
) -> dict[str, Any]:
    """Carry out the protocol on measured curves.

    Args:
        settings: the evaluation's settings, with ``horizon`` and ``eval_every`` (steps), ``smoothing`` (evaluations).
        environment: versions and device.
        seeds: the seeds, in the order of the curves' rows.
        grid_curves: Adam's test losses for ``protocol.LEARNING_RATES``, not smoothed.
        outcomes: the optimizers; the first one is tuned Adam, the baseline.
        one_core: whether steps were timed on one core.
        waiting: the part of the time in which they waited for a processor.

    Returns:
        A JSON value; numbers that are not finite are None.
    """
    steps = protocol.evaluation_steps(settings["horizon"], settings["eval_every"])
    window = settings["smoothing"]
    grid_best = protocol.smooth(grid_curves, window).min(axis=2)
    baseline = outcomes[0]
    goal = protocol.target(protocol.smooth(baseline.test_loss, window), steps)
    baseline_seconds = float(np.median(baseline.seconds_per_step))

    rows = []
    for outcome in outcomes:
        smoothed = protocol.smooth(outcome.test_loss, window)
        seconds = float(np.median(outcome.seconds_per_step))
        first = protocol.first_steps(smoothed, steps, goal.loss)
        factor = protocol.step_reduction(smoothed, steps, goal)
        # A mean over the seeds that did not diverge would flatter; only of the factors are misses told apart.
        factors = {"step_reduction": factor, "training_time_speed_up": factor * baseline_seconds / seconds}
        losses = {
            "best_test_loss": smoothed.min(axis=1),
            "final_test_loss": smoothed[:, -1],
            "mean_training_loss": outcome.train_loss.mean(axis=1),
        }
        measures = factors | losses
        spreads = {key: dict(zip(("mean", "std"), protocol.mean_and_std(value))) for key, value in measures.items()}
        spreads |= {key: {"mean": math.inf, "std": None} for key, v in losses.items() if not np.isfinite(v).all()}
        rows.append(
            {
                "name": outcome.name,
                "source": outcome.source,
                **({"digest": outcome.digest} if outcome.digest else {}),
                "hits": int(np.isfinite(first).sum()),
                "misses": int(np.isnan(first).sum()),
                **spreads,
                "seconds_per_step": {"median": seconds, "rounds": outcome.seconds_per_step.tolist()},
                "seeds": [
                    {"seed": seed, "miss": bool(np.isnan(first[i])), "first_step": _integer(first[i])}
                    | {key: float(value[i]) for key, value in measures.items()}
                    for i, seed in enumerate(seeds)
                ],
            }
        )
    chosen = protocol.best_setting(protocol.smooth(grid_curves, window))
    report = {
        "settings": dict(settings),
        "environment": dict(environment),
        "baseline": {
            "name": baseline.name,
            "learning_rate": protocol.LEARNING_RATES[chosen],
            "at_edge_of_grid": chosen in (0, len(protocol.LEARNING_RATES) - 1),
            "seeds": [
                {"seed": seed, "best_test_loss": float(goal.loss[i]), "step": int(goal.step[i])}
                for i, seed in enumerate(seeds)
            ],
            "grid": [
                {"learning_rate": rate, "best_test_loss_mean": float(best.mean()), "best_test_loss": best.tolist()}
                for rate, best in zip(protocol.LEARNING_RATES, grid_best)
            ],
        },
        "timing": {"one_core": one_core, "waiting": waiting, "busy": waiting > BUSY},
        "optimizers": rows,
        "curves": {
            "steps": steps.tolist(),
            "test_loss": {outcome.name: outcome.test_loss.tolist() for outcome in outcomes},
            "training_loss": {outcome.name: outcome.train_loss.tolist() for outcome in outcomes},
        },
    }
    return _finite(report)


def task_title(settings: Mapping[str, Any]) -> str:
    """The name of the task, with those of its own settings that were not left as they are."""
    changed = ", ".join(f"{key}={_short(value)}" for key, value in settings.get("task_settings", {}).items())
    details = f" ({changed})" if changed else ""
    split = f" on the {settings['split']} split" if "split" in settings else ""
    return f"{settings['task']}{details}{split}"


def table(report: Mapping[str, Any]) -> str:
    """The main table: one line per optimizer, in Markdown with aligned columns; a footnote if the machine was busy."""
    columns = {
        "step_reduction": ("step reduction", 2),
        "training_time_speed_up": ("training-time speed-up", 2),
        "best_test_loss": ("best test loss", 4),
        "final_test_loss": ("final test loss", 4),
        "mean_training_loss": ("mean training loss", 4),
    }
    head = ["optimizer", *(name for name, _ in columns.values()), "time per step"]
    lines = []
    for row in report["optimizers"]:
        cells = [spread(row[key], n) + _misses(row) * (not key.endswith("loss")) for key, (_, n) in columns.items()]
        lines.append([row["name"], *cells, f"{row['seconds_per_step']['median'] * 1e3:.3f} ms"])
    waiting = report["timing"]["waiting"]
    busy = (
        f"\n\nThe machine was busy while steps were timed ({waiting:.0%} of the time went by waiting for a processor): "
        "times per step and training-time speed-ups are uncertain."
    )
    return markdown_table(head, lines) + busy * report["timing"]["busy"]


def markdown(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The readable report.

    Args:
        report: from :func:`build_report`.
        pictures: file names of pictures beside the report.
    """
    settings, environment, baseline = report["settings"], report["environment"], report["baseline"]
    count, rate = len(baseline["seeds"]), baseline["learning_rate"]
    smoothing, cap = settings["smoothing"], settings["loss_cap"]
    capped = "" if cap is None else f" Training losses above {cap:g} or not finite count as {cap:g}."
    edge = " **This is the edge of the grid: Adam might do better beyond it.**" if baseline["at_edge_of_grid"] else ""
    names = [row["name"] for row in report["optimizers"]]
    rounds = len(report["optimizers"][0]["seconds_per_step"]["rounds"])
    per_seed = [
        [str(seed["seed"]), f"{seed['best_test_loss']:.4f}", str(seed["step"])]
        + [_seed_cell(row["seeds"][i]) for row in report["optimizers"][1:]]
        for i, seed in enumerate(baseline["seeds"])
    ]
    grid = [
        [f"{p['learning_rate']:.4f}", _number(p["best_test_loss_mean"], 4), "chosen" * (p["learning_rate"] == rate)]
        for p in baseline["grid"]
    ]
    sources = [[row["name"], f"`{row['source']}`"] for row in report["optimizers"]]
    sections = [
        f"# {task_title(settings)}: learned optimizers against tuned Adam",
        table(report),
        f"Mean ± sample standard deviation over {count} seed{'s' * (count != 1)}. *Step reduction*: the step at which "
        "tuned Adam has its best test loss `L*`, divided by the first step at which the optimizer's test loss is at "
        "most `L*`, for each seed. A seed on which it never is within the horizon is a miss: it has no factor, so mean "
        "and deviation are over the other seeds. *Training-time speed-up*: step reduction times (Adam's time per "
        "step / the optimizer's).",
        *(f"![{picture.rsplit('.', 1)[0]}]({picture})" for picture in pictures),
        "## Protocol",
        f"- Horizon {settings['horizon']} steps; test loss on {_test_set(settings)} "
        f"after every {_steps(settings['eval_every'])}, so that steps in this report are multiples of "
        f"{settings['eval_every']}.\n"
        + (
            "- Test losses are not smoothed.\n"
            if smoothing == 1
            else f"- All test losses, the baseline's too, are smoothed by a trailing running mean over {smoothing} "
            f"evaluations ({smoothing * settings['eval_every']} steps).\n"
        )
        + f"- Tuned Adam: learning rate {rate:g}, of 0.0005 j for j = 1..20 the one with the best mean over seeds of "
        f"the best test loss.{edge}\n"
        "- Every optimizer trains from the same initialisations on the same batches: both depend on the seed only.\n"
        f"- Test losses that are not finite count as infinite.{capped}\n"
        "- Time per step: one compiled step (gradients, factors where needed, update; the batch is given)"
        f"{' on one core' * report['timing']['one_core']}, median of {rounds} rounds in which all took turns.",
        "## Seeds",
        markdown_table(
            ["seed", "Adam's `L*`", "at step", *(f"{name}: factor (at step)" for name in names[1:])], per_seed
        ),
        "## Adam's learning rates",
        markdown_table(["learning rate", "mean best test loss", ""], grid),
        "## Optimizers",
        markdown_table(["name", "source"], sources),
        "## Environment",
        "\n".join(f"- {key}: {value}" for key, value in environment.items()),
    ]
    return "\n\n".join(sections) + "\n"


def transfer_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """The same optimizers on several tasks: the step reduction of each on each, in Markdown.

    Args:
        reports: one report per task, from :func:`build_report`, with the same optimizers in the same order.
    """
    lines = []
    for report in reports:
        cells = [spread(row["step_reduction"], 2) + _misses(row) for row in report["optimizers"][1:]]
        lines.append([task_title(report["settings"]), f"{report['baseline']['learning_rate']:g}", *cells])
    names = [row["name"] for row in reports[0]["optimizers"][1:]]
    return markdown_table(["step reduction on", "Adam's rate", *names], lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown with aligned columns."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _misses(row: Mapping[str, Any]) -> str:
    return f" ({row['misses']} of {len(row['seeds'])} missed)" if row["misses"] else ""


def _seed_cell(seed: Mapping[str, Any]) -> str:
    return "miss" if seed["miss"] else f"{seed['step_reduction']:.2f} ({seed['first_step']})"


def spread(value: Mapping[str, float | None], digits: int) -> str:
    """A mean and its standard deviation, with so many digits; a dash where there is no mean."""
    deviation = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return _number(value["mean"], digits) + deviation


def _number(value: float | None, digits: int) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def _short(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _test_set(settings: Mapping[str, Any]) -> str:
    split = f"the {settings.get('split', 'test')} split"
    if "test_subset" in settings:
        return f"{settings['test_subset']}, a fixed part of {split} evenly spaced over it,"
    return f"all {settings['test_examples']} examples of {split}"


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"


def _integer(value: float) -> int | None:
    return int(value) if math.isfinite(value) else None


def _finite(value: Any) -> Any:
    """The JSON value with None for every number that is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
