"""The arithmetic of both protocols, and the report of the paper's, against curves made by hand."""

import json
import math

import numpy as np
import optax
import pytest

from gmn_lopt.evaluation import paper, protocol
from gmn_lopt.evaluation.paper import Paper
from gmn_lopt.evaluation.report import build_report, markdown, table
from gmn_lopt.evaluation.runs import Tuned
from gmn_lopt.evaluation.timing import Timing
from gmn_lopt.evaluation.training import Candidate, Curves
from gmn_lopt.util.errors import UsageError

STEPS = np.array([10, 20, 30, 40, 50])
ADAM = np.array([[5.0, 3, 1, 2, 1], [4, 3, 2, 1.5, 1.2]])


def test_smoothing_is_a_trailing_mean_of_what_there_is():
    curve = np.array([[4.0, 2.0, 6.0, 1.0]])
    np.testing.assert_allclose(protocol.smooth(curve, 1), curve)
    np.testing.assert_allclose(protocol.smooth(curve, 2), [[4, 3, 4, 3.5]])
    np.testing.assert_allclose(protocol.smooth(curve, 3), [[4, 3, 4, 3]])
    np.testing.assert_allclose(protocol.smooth(curve, 99), [[4, 3, 4, 3.25]])


def test_losses_that_are_not_finite_are_infinite_within_the_window_only():
    for bad in (np.nan, np.inf, -np.inf):
        smoothed = protocol.smooth(np.array([[1.0, bad, 3.0, 5.0]]), 2)
        np.testing.assert_array_equal(smoothed, [[1, np.inf, np.inf, 4]])


def test_the_papers_goal_is_the_first_step_with_the_best_loss():
    of, goal = Paper().goal([ADAM], STEPS)
    assert of == 0
    np.testing.assert_array_equal(goal.loss, [1, 1.2])
    np.testing.assert_array_equal(goal.step, [30, 50])


def test_first_steps_and_misses():
    goal = np.array([1.0, 1.2])
    np.testing.assert_array_equal(protocol.first_steps(ADAM, STEPS, goal), [30, 50])
    # Reaching the loss exactly counts, and reaching it counts even if the curve turns up again.
    faster = np.array([[2, 1.0, 9, 9, 9], [1.1, 9, 9, 9, 9]])
    np.testing.assert_array_equal(protocol.first_steps(faster, STEPS, goal), [20, 10])
    missing = protocol.smooth(np.array([[1.001] * 5, [9, np.nan, -np.inf, 9, 1.2]]), 1)
    np.testing.assert_array_equal(protocol.first_steps(missing, STEPS, goal), [np.nan, 50])


def test_tuning_takes_the_best_mean_over_seeds_of_the_best_loss():
    curves = np.array(
        [
            [[3.0, 2.0], [2.0, 4.0]],  # bests 2, 2
            [[0.1, 5.0], [5.0, 4.0]],  # bests 0.1, 4
            [[2.0, 2.0], [2.0, 2.0]],  # bests 2, 2: as good as the first, but later in the grid
            [[0.0, 0.0], [np.inf, np.inf]],
        ]
    )
    assert paper.best_setting(curves) == 0
    with pytest.raises(UsageError, match="finite"):
        paper.best_setting(curves[3:])


def test_the_grid_is_that_of_the_protocol():
    np.testing.assert_allclose(paper.LEARNING_RATES, np.linspace(0.0005, 0.01, 20))


def test_mean_and_std():
    assert protocol.mean_and_std(np.array([1.0, 3.0, np.nan])) == {"mean": 2.0, "std": math.sqrt(2)}
    assert protocol.mean_and_std(np.array([1.0, np.nan])) == {"mean": 1.0, "std": None}
    assert protocol.mean_and_std(np.array([np.nan])) == {"mean": None, "std": None}


@pytest.mark.parametrize(("horizon", "every"), [(500, 1), (10, 1), (2000, 10), (501, 3), (1009, 1), (512, 8)])
def test_default_distance_of_evaluations(horizon, every):
    assert protocol.default_eval_every(horizon) == every
    assert protocol.evaluation_steps(horizon, every)[-1] == horizon


def report_of(*others: np.ndarray, smoothing: int = 1, loss_cap: float = 9.0, waiting: float = 0.01):
    names = ["adam", *(f"other {i}" for i in range(len(others)))]
    candidates = [Candidate(name, name, "", lambda _: optax.adam(1.0)) for name in names]
    curves = [Curves(each, np.ones_like(each), np.zeros((2, 6, 0))) for each in (ADAM, *others)]
    # The median does not mind one slow round.
    times = np.array([[1.0, 1.0, 100.0], *([4.0, 4.0, 100.0] for _ in others)]) / 1e3
    settings = {"task": "toy", "horizon": 50, "eval_every": 10, "smoothing": smoothing, "test_examples": 7}
    settings |= {"loss_cap": loss_cap, "seeds": [3, 4]}
    facts = {"name": "adam", "learning_rate": 0.01, "at_edge_of_grid": True}
    facts["grid"] = [{"learning_rate": 0.01, "best_test_loss_mean": 1.1, "best_test_loss": [1.0, 1.2]}]
    tuned, others = Tuned(candidates[:1], curves[:1], facts), list(zip(candidates, curves))[1:]
    return build_report(settings, {"jax": "1"}, Paper(), tuned, others, Timing(times, True, waiting))


def test_report_says_what_the_protocol_asks_for():
    report = report_of(np.array([[2, 1.0, 9, 9, 9], [9, 9, 9, 9, 9]]), np.full((2, 5), 1.0), np.full((2, 5), 8.0))
    adam, half, all_, none = report["optimizers"]
    assert adam["step_reduction"] == {"mean": 1.0, "std": 0.0}
    assert (half["hits"], half["misses"]) == (1, 1)
    assert half["step_reduction"] == {"mean": 1.5, "std": None}
    assert half["training_time_speed_up"]["mean"] == pytest.approx(1.5 / 4)
    assert half["seeds"][1] == half["seeds"][1] | {"seed": 4, "miss": True, "first_step": None, "step_reduction": None}
    assert half["best_test_loss"]["mean"] == 5.0
    assert half["final_test_loss"]["mean"] == 9.0
    assert all_["step_reduction"]["mean"] == pytest.approx((3 + 5) / 2)
    assert none["step_reduction"] == {"mean": None, "std": None}
    assert report["baseline"]["learning_rate"] == 0.01
    assert report["baseline"]["at_edge_of_grid"]
    assert [seed["step"] for seed in report["baseline"]["seeds"]] == [30, 50]

    lines = table(report).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "1.50 (1 of 2 missed)" in lines[3]
    step_reduction, speed_up = (cell.strip() for cell in lines[4].split("|")[2:4])
    assert lines[0].split("|")[3].strip() == "training-time speed-up"
    assert step_reduction == "4.00 ± 1.41"
    factors = np.array([seed["step_reduction"] for seed in all_["seeds"]])
    times = [row["seconds_per_step"]["median"] for row in (adam, all_)]
    speed_ups = factors * times[0] / times[1]
    assert speed_up == f"{speed_ups.mean():.2f} ± {speed_ups.std(ddof=1):.2f}"
    assert "— (2 of 2 missed)" in lines[5]
    text = markdown(report, ["curves.png"])
    assert "edge of the grid" in text
    assert "miss" in text


def test_a_diverged_run_is_not_averaged_away():
    report = report_of(np.array([[2, 1.0, 1, 1, np.nan], [np.nan] * 5]), loss_cap=math.inf)
    row = report["optimizers"][1]
    assert row["best_test_loss"] == {"mean": None, "std": None}
    assert row["final_test_loss"] == {"mean": None, "std": None}
    assert row["misses"] == 1
    json.dumps(report, allow_nan=False)  # JSON has no NaN
    markdown(report, [])


def test_smoothing_applies_to_the_baseline_too():
    report = report_of(smoothing=2)
    assert report["baseline"]["seeds"][0] == {"seed": 3, "best_test_loss": 1.5, "step": 40}


def test_a_busy_machine_is_said():
    calm, busy = (report_of(ADAM, waiting=waiting) for waiting in (0.09, 0.43))
    assert calm["timing"] == {"one_core": True, "waiting": 0.09, "busy": False}
    assert busy["timing"] == {"one_core": True, "waiting": 0.43, "busy": True}
    for text in (table(busy), markdown(busy, [])):
        assert "The machine was busy while steps were timed (43% of the time" in text
    assert "busy" not in markdown(calm, [])
    assert "the batch is given) on one core, median of 3 rounds" in markdown(calm, [])
