"""The report of an evaluation: everything as one JSON document, and a readable summary of it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gmn_lopt.evaluation import protocol, report_fair, report_paper
from gmn_lopt.evaluation.fair import Fair
from gmn_lopt.evaluation.paper import Paper
from gmn_lopt.evaluation.protocol import Target
from gmn_lopt.evaluation.runs import Tuned
from gmn_lopt.evaluation.tables import items, markdown_table, misses, spread
from gmn_lopt.evaluation.timing import Timing
from gmn_lopt.evaluation.training import Candidate, Curves

BUSY = 0.1
"""The part of the time spent waiting for a processor from which a machine was busy, so that times are uncertain."""
OF_HITS = ("step_reduction", "training_time_speed_up", "steps_to_goal", "seconds_to_goal")
"""What has no value on a seed that missed the goal."""


def build_report(
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    by: Fair | Paper,
    tuned: Tuned,
    others: Sequence[tuple[Candidate, Curves]],
    timing: Timing,
) -> dict[str, Any]:
    """Carry out the protocol on measured curves.

    Args:
        settings: the evaluation's settings, with ``seeds`` (in the order of the curves' rows), ``horizon`` and
            ``eval_every`` (steps), ``smoothing`` (evaluations).
        environment: versions and device.
        by: the protocol.
        tuned: the baselines.
        others: the optimizers, and their curves.
        timing: of all optimizers, the baselines first.

    Returns:
        A JSON value; numbers that are not finite are None.

    Raises:
        UsageError: if no baseline reaches a loss that could be a goal.
    """
    seeds, window = settings["seeds"], settings["smoothing"]
    steps = protocol.evaluation_steps(settings["horizon"], settings["eval_every"])
    of, goal = by.goal([protocol.smooth(own.test_loss, window) for own in tuned.curves], steps)
    medians = np.median(timing.seconds, axis=1)
    everyone = [*zip(tuned.candidates, tuned.curves, strict=True), *others]

    rows = []
    for (candidate, own), rounds, seconds in zip(everyone, timing.seconds, medians, strict=True):
        smoothed = protocol.smooth(own.test_loss, window)
        first = protocol.first_steps(smoothed, steps, goal.loss)
        measures = _measures(smoothed, own, first, goal, medians[of], seconds)
        measures = {key: measures[key] for key in by.measures}
        spreads = {key: protocol.mean_and_std(values) for key, values in measures.items()}
        for key, values in measures.items():
            # A mean over the seeds that did not diverge would flatter; only of what counts hits are misses told apart.
            if key not in OF_HITS and not np.isfinite(values).all():
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
        **by.facts(tuned, seeds, goal, of),
        "timing": {"one_core": timing.one_core, "waiting": timing.waiting, "busy": timing.waiting > BUSY},
        "optimizers": rows,
        "curves": {
            "steps": steps.tolist(),
            "test_loss": {candidate.name: own.test_loss.tolist() for candidate, own in everyone},
            "training_loss": {candidate.name: own.train_loss.tolist() for candidate, own in everyone},
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
    by, words = _protocol_of(report)
    lines = []
    for row in report["optimizers"]:
        cells = [spread(row[key], n) + misses(row) * (key in OF_HITS) for key, (_, n) in by.measures.items()]
        lines.append([row["name"], *cells, f"{row['seconds_per_step']['median'] * 1e3:.3f} ms"])
    text = markdown_table(["optimizer", *words.columns(report).values(), "time per step"], lines)
    timing = report["timing"]
    if timing["busy"]:
        text += (
            f"\n\nThe machine was busy while steps were timed ({timing['waiting']:.0%} of the time went by waiting for "
            f"a processor): times per step and {words.OF_TIMES} are uncertain."
        )
    return text


def transfer_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """The same optimizers, in the same order, on several tasks: one report for each."""
    _, words = _protocol_of(reports[0])
    rows = [words.summary(report) for report in reports]
    lines = [[task_title(report["settings"]), *row.values()] for report, row in zip(reports, rows)]
    return markdown_table([words.SUMMARY, *rows[0]], lines)


def markdown(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The readable form of what :func:`build_report` returns, with pictures that lie beside it."""
    _, words = _protocol_of(report)
    settings, rows = report["settings"], report["optimizers"]
    sections = [
        f"# {task_title(settings)}: {words.TITLE}",
        table(report),
        words.explanation(len(settings["seeds"])),
        *(f"![{picture.rsplit('.', 1)[0]}]({picture})" for picture in pictures),
        "## Protocol",
        items(_protocol(report)),
        *words.sections(report),
        "## Optimizers",
        markdown_table(["name", "source"], [[row["name"], f"`{row['source']}`"] for row in rows]),
        "## Environment",
        items([f"{key}: {value}" for key, value in report["environment"].items()]),
    ]
    return "\n\n".join(sections) + "\n"


def goal_of(report: Mapping[str, Any]) -> str:
    """What optimizers are to reach, in words."""
    return _protocol_of(report)[1].goal(report)


def _measures(smoothed, own, first, goal: Target, reference: float, seconds: float) -> dict[str, Any]:
    """All that can be measured, for each seed."""
    factor = goal.step / first
    return {
        "step_reduction": factor,
        "training_time_speed_up": factor * reference / seconds,
        "steps_to_goal": first,
        "seconds_to_goal": first * seconds,
        "best_test_loss": smoothed.min(axis=1),
        "final_test_loss": smoothed[:, -1],
        "mean_training_loss": own.train_loss.mean(axis=1),
    }


def _protocol_of(report: Mapping[str, Any]) -> tuple[type[Fair] | type[Paper], Any]:
    """The protocol of a report, and the module that has its words."""
    return (Fair, report_fair) if report["settings"].get("protocol") == "fair" else (Paper, report_paper)


def _protocol(report: Mapping[str, Any]) -> list[str]:
    settings = report["settings"]
    every, smoothing, cap = settings["eval_every"], settings["smoothing"], settings["loss_cap"]
    split = f"the {settings.get('split', 'test')} split"
    examples = f"all {settings['test_examples']} examples of {split}"
    if "test_subset" in settings:
        examples = f"{settings['test_subset']}, a fixed part of {split} evenly spaced over it,"
    smoothed = "Test losses are not smoothed."
    if smoothing > 1:
        smoothed = (
            f"All test losses, the baselines' too, are smoothed by a trailing running mean over {smoothing} "
            f"evaluations ({smoothing * every} steps)."
        )
    capped = "" if cap is None else f" Training losses above {cap:g} or not finite count as {cap:g}."
    rounds = len(report["optimizers"][0]["seconds_per_step"]["rounds"])
    return [
        f"Horizon {settings['horizon']} steps; test loss on {examples} after every "
        f"{'step' if every == 1 else f'{every} steps'}, so that steps in this report are multiples of {every}.",
        smoothed,
        *_protocol_of(report)[1].baselines(report),
        "Every optimizer trains from the same initialisations on the same batches: both depend on the seed only.",
        f"Test losses that are not finite count as infinite.{capped}",
        "Time per step: one compiled step (gradients, factors where needed, update; the batch is given)"
        f"{' on one core' * report['timing']['one_core']}, median of {rounds} rounds in which all took turns.",
    ]


def _finite(value: Any) -> Any:
    """The JSON value with None for every number that is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
