import sys
from pathlib import Path

import numpy as np
import pytest

import meta_train
from gmn_lopt.evaluation import protocol
from tasks import load_task

sys.path.append(str(Path(meta_train.__file__).parent / "bench"))

import estimators
from estimator_runs import make_run
from estimators import VARIANTS, Config, UsageError, main


def config(out, **changes):
    defaults = {"tasks": ("digits_mlp",), "only": ("nres", "truncated-10"), "optimizer": "sgdm"}
    return Config(out=out, **defaults | {"inner_steps": 2000, "minutes": 0.001, "seeds": 1, "eval_seeds": 2, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("estimators")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "LEARNING_RATES", (0.001, 0.01))
        yield out, main(config(out, horizon=50))


def test_report(finished):
    out, text = finished
    assert (out / "report.md").read_text() == text
    assert (out / "digits_mlp.png").stat().st_size > 1000
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|") and "---" not in line]
    assert [row[0].strip() for row in rows] == ["variant", rows[1][0].strip(), "nres", "truncated-10"] * 2
    steps = {row[0].strip(): row[5].strip() for row in rows[:4]}
    assert (steps["nres"], steps["truncated-10"]) == ("3,200", "2,080"), "not the first meta-step past the budget"


def test_a_finished_run_is_not_done_again(finished, monkeypatch):
    out, text = finished
    monkeypatch.setattr(estimators, "one_run", lambda *args: pytest.fail("done again"))
    assert main(config(out, horizon=50)) == text
    monkeypatch.setitem(estimators.VARIANTS, "nres", {"stages": "nres:n=4"})
    with pytest.raises(pytest.fail.Exception, match="done again"):
        main(config(out, horizon=50))


def test_record_and_snapshots(finished):
    (file,) = (finished[0] / "digits_mlp").glob("nres*.npz")
    run = np.load(file)
    assert run["loss"].shape == run["seconds"].shape == (len(run["inner_steps"]),)
    np.testing.assert_array_equal(run["inner_steps"], 1600 * np.arange(1, len(run["loss"]) + 1))
    assert (np.diff(run["seconds"]) > 0).all()
    at_steps, at_time = run["snapshots"]
    assert at_steps == 2
    assert run["seconds"][at_time - 1] >= 0.06
    assert at_time == 1 or run["seconds"][at_time - 2] < 0.06
    assert run["phi"].shape == (2, 2)
    np.testing.assert_allclose(run["phi"][:, 0], np.log(0.1), atol=0.1)
    assert run["test_loss"].shape == run["train_loss"].shape == (2, 2, 50)


def test_a_stage_gets_an_equal_part_of_the_budget_and_the_rest_goes_to_the_optimizer():
    settings = {"stages": "truncated:K=25,pes:n=16:ema=0.5", "meta_clip": 0.5, "initial": {"alpha": 2.0}, "width": 8}
    run = make_run(load_task("digits_mlp"), settings | {"optimizer": "ds"}, 0.01, 8, 10_000)
    assert [stage.meta_steps for stage, _ in run.stages] == [25, 4]  # of 200 and of 1600 inner steps
    assert [stage.learning_rate for stage, _ in run.stages] == [0.01, 0.01]
    assert (run.lopt.width, run.lopt.backbone, run.lopt.gradmetanet) == (8, "ds", None)
    assert (run.meta_clip, run.initial) == (0.5, {"alpha": 2.0})


def test_every_variant_can_be_made():
    task = load_task("digits_mlp")
    for overrides in VARIANTS.values():
        make_run(task, {"optimizer": "ds"} | overrides, 1e-3, 16, 1_000_000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ("rnn",)}, "--only rnn: no such variant; there are pes, es, nres"),
        ({"tasks": ("mnist",)}, "unknown task 'mnist'"),
        ({"horizon": 70}, "variant nres on digits_mlp: truncation 50 does not divide the horizon 70"),
        ({"seeds": 0}, "--seeds is 0; it must be positive"),
    ],
)
def test_wrong_input_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(UsageError) as error:
        main(config(tmp_path, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
