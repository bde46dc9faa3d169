import numpy as np
import pytest

from bench import estimators
from bench.estimators import VARIANTS, Config, main, make_job
from bench.variants import Variant
from gmn_lopt.evaluation import protocol
from gmn_lopt.optimizers.recipes import SGDM
from gmn_lopt.tasks import load_task
from gmn_lopt.util.errors import UsageError


def config(out, **changes):
    few = {"tasks": ("digits_mlp",), "only": ("a", "b"), "inner_steps": 2000, "minutes": 0.001}
    return Config(out=out, **few | {"seeds": 1, "eval_seeds": 2} | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("estimators")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "LEARNING_RATES", (0.001, 0.01))
        patch.setitem(VARIANTS, "a", Variant(("nres",), SGDM))
        patch.setitem(VARIANTS, "b", Variant(("truncated:truncation=10",), SGDM))
        yield out, main(config(out, horizon=50))


def test_report(finished):
    out, text = finished
    assert (out / "report.md").read_text() == text
    assert (out / "digits_mlp.png").stat().st_size > 1000
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|") and "---" not in line]
    assert [row[0].strip() for row in rows] == ["variant", rows[1][0].strip(), "a", "b"] * 2
    steps = {row[0].strip(): row[5].strip() for row in rows[:4]}
    assert (steps["a"], steps["b"]) == ("3,200", "2,080"), "not the first meta-step past the budget"


def test_a_finished_run_is_not_done_again(finished, monkeypatch):
    out, text = finished
    monkeypatch.setattr(estimators, "meta_train", lambda *args: pytest.fail("done again"))
    assert main(config(out, horizon=50)) == text
    monkeypatch.setitem(VARIANTS, "a", Variant(("nres:pairs=4",), SGDM))
    with pytest.raises(pytest.fail.Exception, match="done again"):
        main(config(out, horizon=50))


def test_record_and_snapshots(finished):
    (file,) = (finished[0] / "digits_mlp").glob("a*.npz")
    run = np.load(file)
    assert run["loss"].shape == run["seconds"].shape == (len(run["inner_steps"]),)
    np.testing.assert_array_equal(run["inner_steps"], 1600 * np.arange(1, len(run["loss"]) + 1))
    assert (np.diff(run["seconds"]) > 0).all()
    at_steps, at_time = run["snapshots"]
    assert at_steps == 2
    assert run["seconds"][at_time - 1] >= 0.06
    assert at_time == 1 or run["seconds"][at_time - 2] < 0.06
    assert run["phi"].shape == (2, 2)
    np.testing.assert_allclose(np.exp(run["phi"]), 0.1, rtol=0.05)  # one minus mu, and alpha, which moved a little
    assert (np.exp(run["phi"]) != np.float32(0.1)).all()
    assert run["test_loss"].shape == run["train_loss"].shape == (2, 2, 50)


def test_a_stage_gets_an_equal_part_of_the_budget(tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "both", Variant(("truncated:truncation=25", "pes:pairs=16")))
    job = make_job(config(tmp_path, inner_steps=10_000, pairs=8, learning_rate=0.01), load_task("digits_mlp"), "both")
    assert [stage.meta_steps for stage in job.stages] == [25, 4]  # of 200 and of 1600 inner steps
    assert [stage.learning_rate for stage in job.stages] == [0.01, 0.01]


def test_every_variant_can_be_made(tmp_path):
    task = load_task("digits_mlp")
    jobs = [make_job(config(tmp_path), task, name) for name in VARIANTS]
    assert len({job.fingerprint for job in jobs}) == len(jobs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ("rnn",)}, "--only rnn: no such variant; there are pes, es, nres"),
        ({"tasks": ("mnist",)}, "unknown task 'mnist'"),
        ({"only": ("nres",), "horizon": 70}, "variant nres on digits_mlp: truncation 50 does not divide"),
        ({"seeds": 0}, "--seeds is 0; it must be positive"),
    ],
)
def test_wrong_input_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(UsageError) as error:
        main(config(tmp_path, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
