"""How a report by the paper's protocol reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from gmn_lopt.evaluation.paper import Paper
from gmn_lopt.evaluation.tables import markdown_table, misses, spread

SUMMARY = "step reduction on"
TITLE = "learned optimizers against tuned Adam"
OF_TIMES = "training-time speed-ups"


def goal(report: Mapping[str, Any]) -> str:
    """What is to be reached."""
    return "tuned Adam's best"


def columns(report: Mapping[str, Any]) -> dict[str, str]:
    """The measures in the table, and their titles."""
    return {key: title for key, (title, _) in Paper.measures.items()}


def others(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The rows of what is no baseline."""
    return report["optimizers"][1:]


def summary(report: Mapping[str, Any]) -> dict[str, str]:
    """A report in one row of a table of several."""
    rows = {row["name"]: spread(row["step_reduction"], 2) + misses(row) for row in report["optimizers"][1:]}
    return {"Adam's rate": f"{report['baseline']['learning_rate']:g}"} | rows


def explanation(seeds: int) -> str:
    """What the numbers of the table are."""
    return (
        f"Mean ± sample standard deviation over {seeds} seed{'s' * (seeds != 1)}. "
        "*Step reduction*: the step at which tuned Adam has its best test loss `L*`, divided by the first step at "
        "which the optimizer's test loss is at most `L*`, for each seed. A seed on which it never is within the "
        "horizon is a miss: it has no factor, so mean and deviation are over the other seeds. "
        "*Training-time speed-up*: step reduction times (Adam's time per step / the optimizer's)."
    )


def baselines(report: Mapping[str, Any]) -> list[str]:
    """How the baseline was chosen."""
    edge = " **This is the edge of the grid: Adam might do better beyond it.**"
    return [
        f"Tuned Adam: learning rate {report['baseline']['learning_rate']:g}, of 0.0005 j for j = 1..20 the one "
        f"with the best mean over seeds of the best test loss.{edge * report['baseline']['at_edge_of_grid']}"
    ]


def sections(report: Mapping[str, Any]) -> list[str]:
    """The seeds, and what was tried."""
    baseline, rows = report["baseline"], report["optimizers"]
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
    head = ["seed", "Adam's `L*`", "at step", *(f"{row['name']}: factor (at step)" for row in rows[1:])]
    return [
        "## Seeds",
        markdown_table(head, per_seed),
        "## Adam's learning rates",
        markdown_table(["learning rate", "mean best test loss", ""], grid),
    ]


def _factor_and_step(seed: Mapping[str, Any]) -> str:
    return "miss" if seed["miss"] else f"{seed['step_reduction']:.2f} ({seed['first_step']})"
