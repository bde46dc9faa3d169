"""How a report by the fair protocol reads."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gmn_lopt.evaluation.fair import Fair
from gmn_lopt.evaluation.tables import markdown_table, misses, settings_shown, spread

SUMMARY = "final test loss on"
TITLE = "learned optimizers against tuned and scheduled baselines"
OF_TIMES = "seconds to it"


def goal(report: Mapping[str, Any]) -> str:
    """What is to be reached."""
    return f"{report['goal']['name']}'s final loss"


def columns(report: Mapping[str, Any]) -> dict[str, str]:
    """The measures in the table, and their titles."""
    titles = {key: title for key, (title, _) in Fair.measures.items()}
    return titles | {"steps_to_goal": f"steps to {goal(report)}"}


def others(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The rows of what is no baseline."""
    return report["optimizers"][len(report["baselines"]) :]


def summary(report: Mapping[str, Any]) -> dict[str, str]:
    """A report in one row of a table of several."""
    rows = {row["name"]: row for row in report["optimizers"]}
    best = rows[report["goal"]["name"]]
    cells = {
        row["name"]: f"{spread(row['final_test_loss'], 4)}, at step {spread(row['steps_to_goal'], 0)}{misses(row)}"
        for row in others(report)
    }
    return {"the best baseline's": f"{spread(best['final_test_loss'], 4)} ({best['name']})"} | cells


def explanation(seeds: int) -> str:
    """What the numbers of the table are."""
    return (
        f"Mean ± sample standard deviation over {seeds} seed{'s' * (seeds != 1)}. *Final test loss*: at the end of "
        "the horizon. *Steps to it*: the first step at which the test loss is at most the final one of the best "
        "baseline, on the same seed. A seed on which it never is within the horizon is a miss, and mean and "
        "deviation are over the other seeds. *Seconds to it*: these steps at the optimizer's time per step."
    )


def baselines(report: Mapping[str, Any]) -> list[str]:
    """How the baselines were chosen."""
    found = report["baselines"]
    edges = [each["name"] for each in found if not each["inside"]]
    outside = f" **The best of {', '.join(edges)} is at the edge of what was tried: it might do better.**"
    return [
        "Baselines have a linear warm-up over 5 % of the horizon and a cosine to zero at its end. Each had "
        f"{len(found[0]['trials'])} trials over peak rate and weight decay, from "
        f"{len(found[0]['trials'][0]['validation_loss'])} seeds of their own; the mean validation loss at the end "
        f"chose.{outside * bool(edges)}",
        *(f"{each['name']}: {settings_shown(each['settings'])}" for each in found),
        "All others ran as they come.",
    ]


def sections(report: Mapping[str, Any]) -> list[str]:
    """The seeds, and what was tried."""
    rows = report["optimizers"]
    per_seed = [
        [str(seed["seed"]), f"{seed['loss']:.4f}", *(_loss_and_step(row["seeds"][i]) for row in rows)]
        for i, seed in enumerate(report["goal"]["seeds"])
    ]
    trials = []
    for each in report["baselines"]:
        for trial in sorted(each["trials"], key=_mean_loss):
            chosen = "chosen" * (trial["settings"] == each["settings"])
            mean = _mean_loss(trial)
            loss = f"{mean:.4f}" if math.isfinite(mean) else "—"
            trials.append([each["name"], settings_shown(trial["settings"]), loss, chosen])
    return [
        "## Seeds",
        markdown_table(["seed", goal(report), *(f"{row['name']}: final (there at step)" for row in rows)], per_seed),
        "## Trials",
        markdown_table(["baseline", "settings", "mean final validation loss", ""], trials),
    ]


def _mean_loss(trial: Mapping[str, Any]) -> float:
    return float(np.mean([math.inf if loss is None else loss for loss in trial["validation_loss"]]))


def _loss_and_step(seed: Mapping[str, Any]) -> str:
    loss = "—" if seed["final_test_loss"] is None else f"{seed['final_test_loss']:.4f}"
    return f"{loss} ({'miss' if seed['miss'] else seed['first_step']})"
