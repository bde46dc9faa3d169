"""The fair protocol: equal trials, the goal, misses, resuming, and what the report says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

from gmn_lopt.evaluation import compare, runs
from gmn_lopt.evaluation import evaluate as evaluation
from gmn_lopt.evaluation.baselines import BASELINES, Axis, Baseline, scheduled
from gmn_lopt.evaluation.evaluate import EvaluationConfig, evaluate, prepare
from gmn_lopt.evaluation.fair import Fair
from gmn_lopt.evaluation.report import build_report, markdown, table, transfer_table
from gmn_lopt.evaluation.runs import Tuned
from gmn_lopt.evaluation.timing import Timing
from gmn_lopt.evaluation.training import Candidate, Curves
from gmn_lopt.meta.task import Task
from gmn_lopt.util.errors import UsageError

STEPS = np.array([10, 20, 30, 40, 50])
A = np.array([[5.0, 3, 1, 2, 1.5], [4, 3, 2, 1.5, 1.3]])  # ends at 1.4 in the mean
B = np.array([[5.0, 4, 3, 2, 1.2], [4, 3, 1, 1.4, 1.4]])  # ends at 1.3


def sgd(total_steps, learning_rate):
    return optax.sgd(scheduled(learning_rate, total_steps))


def sign(total_steps, learning_rate, weight_decay):
    return optax.chain(
        optax.scale_by_sign(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(scheduled(learning_rate, total_steps)),
    )


SGD = Baseline("sgd", sgd, (Axis("learning_rate", 0.001, 2.0),))  # the start is far from the best
SIGN = Baseline("sign", sign, (Axis("learning_rate", 0.02, 2.0), Axis("weight_decay", 0.1, 10.0, zero_at=-1)))


def quadratic() -> Task:
    """Two weights; the validation split asks for other weights than the test split."""
    x = jax.random.normal(jax.random.key(1), (60, 2))
    data = {"x": x, "y": x @ jnp.array([1.0, -1.0])}
    part = lambda a, b: jax.tree.map(lambda leaf: leaf[a:b], data)  # noqa: E731
    valid = {"x": x[30:45], "y": 0.7 * data["y"][30:45]}

    def sample(key, split):
        chosen = jax.random.randint(key, (8,), 0, 30)
        return jax.tree.map(lambda leaf: leaf[chosen], split)

    return Task(
        name="quadratic",
        horizon=20,
        batch_size=8,
        loss_cap=10.0,
        data={"train": part(0, 30), "valid": valid, "test": part(45, 60)},
        init=lambda key: {"w": 0.1 * jax.random.normal(key, (2,))},
        loss=lambda params, batch: jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2),
        sample=sample,
    )


TASK = quadratic()


@pytest.fixture
def trained(monkeypatch):
    """The name, seeds and number of settings of what has been trained, in order."""
    found: list[tuple] = []
    train = runs.training_curves

    def count(task, candidate, seeds, every, *, grid, **others):
        found.append((candidate.name, tuple(seeds), len(jax.tree.leaves(candidate.hyper)[0]) if grid else None))
        return train(task, candidate, seeds, every, grid=grid, **others)

    monkeypatch.setattr(runs, "training_curves", count)
    monkeypatch.setattr(evaluation, "time_per_step", lambda task, all_, **_: Timing(np.ones((len(all_), 2)), False, 0))
    monkeypatch.setattr(evaluation.plots, "plot_trajectories", lambda *_: None)
    monkeypatch.setattr(evaluation.plots, "draw_curves", lambda *_: Figure())
    return found


def problem(out, *optimizers, by=None, **changes):
    config = EvaluationConfig(**{"seeds": 2, "trials_at_once": 3} | changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvaluationConfig, "make_protocol", lambda _: by or Fair((SGD, SIGN), at_once=3))
        return prepare(TASK, optimizers, out, config)


def test_all_have_the_same_number_of_trials_until_the_best_of_each_is_inside(tmp_path, trained):
    report = evaluate(problem(tmp_path)).report
    of_sgd, of_sign = report["baselines"]
    assert len(of_sgd["trials"]) == len(of_sign["trials"]) > 3
    assert of_sgd["inside"] and of_sign["inside"]
    rates = sorted(trial["settings"]["learning_rate"] for trial in of_sgd["trials"])
    chosen = of_sgd["settings"]["learning_rate"]
    assert rates[0] < chosen < rates[-1]
    assert chosen > 0.05, "the grid went on to where the best is"
    # One round more would have been needed for nothing: before the last, one of them was not inside.
    rounds = len(of_sgd["trials"]) // 3
    before = Fair((SGD, SIGN), at_once=3, most_rounds=rounds - 1)
    fewer = evaluate(problem(tmp_path, by=before)).report
    assert not all(each["inside"] for each in fewer["baselines"])
    assert "at the edge of what was tried" in markdown(fewer, []) and "at the edge" not in markdown(report, [])


def test_the_validation_loss_at_the_end_chooses_from_other_seeds(tmp_path, trained):
    report = evaluate(problem(tmp_path)).report
    assert {seeds for _, seeds, count in trained if count} == {(2, 3)}
    assert {seeds for _, seeds, count in trained if not count} == {(0, 1)}
    for each in report["baselines"]:
        best = min(each["trials"], key=lambda trial: np.mean(trial["validation_loss"]))
        assert best["settings"] == each["settings"]
    # The chosen trial, by hand: trained on batches of the training split, its last loss taken on the validation split.
    settings = report["baselines"][0]["settings"]
    init_key, batches = jax.random.split(jax.random.key(3))
    params, tx = TASK.init(init_key), sgd(20, **settings)
    state = tx.init(params)
    for t in range(20):
        grads = jax.grad(TASK.loss)(params, TASK.sample(jax.random.fold_in(batches, t), TASK.data["train"]))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    (trial,) = (trial for trial in report["baselines"][0]["trials"] if trial["settings"] == settings)
    assert trial["validation_loss"][1] == pytest.approx(float(TASK.loss(params, TASK.data["valid"])), rel=1e-4)


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path, trained, monkeypatch):
    train = runs.training_curves

    def interrupt(*args, **kwargs):
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "training_curves", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate(problem(tmp_path / "a"))
    resumed = evaluate(problem(tmp_path / "a")).report
    whole = len(trained)
    straight = evaluate(problem(tmp_path / "b")).report
    assert len(trained) == 2 * whole, "nothing was trained twice"
    assert straight == resumed
    evaluate(problem(tmp_path / "a"))
    assert len(trained) == 2 * whole, "what is finished is not trained again"
    # One more optimizer, and one baseline less: only what is new.
    evaluate(problem(tmp_path / "a", "optax:lion:learning_rate=0.05", by=Fair((SIGN,), at_once=3)))
    assert [name for name, *_ in trained[2 * whole :]] == ["lion(learning_rate=0.05)"]


def test_results_of_the_other_protocol_are_refused(tmp_path, trained):
    evaluate(problem(tmp_path))
    with pytest.raises(UsageError, match="protocol was 'fair', is None"):
        prepare(TASK, (), tmp_path, EvaluationConfig(seeds=2, protocol="paper"))


def test_a_baseline_that_always_diverges_is_said(tmp_path, trained):
    never = Baseline("never", lambda total_steps, learning_rate: optax.sgd(jnp.nan), SGD.axes)
    with pytest.raises(UsageError, match="no setting of never reaches a finite validation loss"):
        evaluate(problem(tmp_path, by=Fair((never,), at_once=3, most_rounds=2)))


def test_names_of_baselines_are_taken(tmp_path):
    with pytest.raises(UsageError, match="'sgd' is taken"):
        problem(tmp_path, "sgd=optax:sgd:learning_rate=0.1")


def test_the_goal_is_the_last_loss_of_the_best_at_the_end():
    of, goal = Fair().goal([A, B], STEPS)
    assert of == 1
    np.testing.assert_array_equal(goal.loss, [1.2, 1.4])
    np.testing.assert_array_equal(goal.step, [50, 50])
    diverged = np.where(B == 1.2, np.inf, B)
    assert Fair().goal([A, diverged], STEPS)[0] == 0
    with pytest.raises(UsageError, match="no baseline ends"):
        Fair().goal([diverged], STEPS)


def report_of(*others: np.ndarray):
    names = ["a", "b", *(f"other {i}" for i in range(len(others)))]
    candidates = [Candidate(name, f"{name}:rate=1", "", lambda _: optax.adam(1.0)) for name in names]
    curves = [Curves(each, np.ones_like(each), np.zeros((2, 6, 0))) for each in (A, B, *others)]
    trial = {"settings": {"learning_rate": 0.1}, "validation_loss": [1.0, None]}
    facts = [{"name": n, "settings": {"learning_rate": 0.1}, "inside": True, "trials": [trial]} for n in "ab"]
    times = np.array([[1.0], [2.0], *([4.0] for _ in others)]) / 1e3
    settings = {"task": "toy", "horizon": 50, "eval_every": 10, "smoothing": 1, "test_examples": 7, "protocol": "fair"}
    settings |= {"loss_cap": 9.0, "seeds": [3, 4]}
    tuned, rest = Tuned(candidates[:2], curves[:2], facts), list(zip(candidates, curves))[2:]
    return build_report(settings, {"jax": "1"}, Fair(), tuned, rest, Timing(times, True, 0.0))


def test_the_report_says_what_the_protocol_asks_for():
    half = np.array([[9, 1.2, 1.1, 1.3, 1.25], [9, 9, 9, 9, 1.41]])
    never, diverged = np.full((2, 5), 8.0), np.array([[1.0] * 5, [1, 1, 1, 1, np.nan]])
    report = report_of(half, never, diverged)
    assert report["goal"] == {"name": "b", "seeds": [{"seed": 3, "loss": 1.2}, {"seed": 4, "loss": 1.4}]}
    a, b, half, never, diverged = report["optimizers"]
    assert (a["hits"], a["misses"]) == (2, 0), "passing it once counts, though it ends above"
    assert b["final_test_loss"]["mean"] == pytest.approx(1.3)
    # The seed without a miss: 20 steps of 4 ms.
    assert (half["hits"], half["misses"]) == (1, 1)
    assert half["steps_to_goal"] == {"mean": 20, "std": None}
    assert half["seconds_to_goal"]["mean"] == pytest.approx(0.08)
    assert half["final_test_loss"]["mean"] == pytest.approx(1.33)
    assert [seed["miss"] for seed in half["seeds"]] == [False, True]
    assert never["steps_to_goal"] == never["seconds_to_goal"] == {"mean": None, "std": None}
    assert diverged["final_test_loss"] == {"mean": None, "std": None}, "a diverged run is not averaged away"
    json.dumps(report, allow_nan=False)

    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(report).splitlines()]
    head = ["optimizer", "final test loss", "steps to b's final loss", "seconds to it"]
    assert lines[0][:4] == head
    assert lines[2][1] == f"1.4000 ± {np.std([1.5, 1.3], ddof=1):.4f}"
    assert lines[4][1] == f"1.3300 ± {np.std([1.25, 1.41], ddof=1):.4f}"
    assert lines[4][2:4] == ["20 (1 of 2 missed)", "0.08 (1 of 2 missed)"]
    assert lines[5][2] == "— (2 of 2 missed)"
    assert lines[6][1] == "—"
    text = markdown(report, ["curves.png"])
    assert "| 1.2500 (20) " in text and "| 1.4100 (miss) " in text
    assert "a: learning_rate=0.1" in text and "1 trials" in text
    several = transfer_table([report, report]).splitlines()
    assert len(several) == 4
    assert f"1.3000 ± {np.std([1.2, 1.4], ddof=1):.4f} (b)" in several[2]
    assert "at step 20 (1 of 2 missed)" in several[2]


def test_flags_choose_the_protocol():
    assert EvaluationConfig().make_protocol() == Fair(BASELINES, at_once=9)
    some = EvaluationConfig(baseline=("soap", "adamw"), trials_at_once=4).make_protocol()
    assert some.names == ("adamw", "soap") and some.at_once == 4
    assert EvaluationConfig(protocol="paper").make_protocol().names == ("adam",)


def test_compare_from_python(tmp_path):
    few = {"seeds": 2, "horizon": 10, "baseline": ("adamw",), "timing_rounds": 1}
    found = compare(TASK, ["optax:lion:learning_rate=0.05"], tmp_path / "kept", **few)
    names = ["adamw", "lion(learning_rate=0.05)"]
    assert [line.split("|")[1].strip() for line in found.table.splitlines()[2:4]] == names
    labels = [str(line.get_label()) for line in found.figure.axes[0].lines]
    assert [label.split(": ends at")[0] for label in labels if ": ends at" in label] == names
    assert found.report["settings"]["horizon"] == 10
    assert json.loads((tmp_path / "kept" / "report.json").read_text()) == found.report
    with pytest.raises(UsageError, match="horizon"):
        compare(TASK, [], horizon=0)
