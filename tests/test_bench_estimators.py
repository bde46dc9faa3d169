import json

import pytest

from bench import estimators
from bench.estimators import ABLATIONS, Config, main, make_variant
from gmn_lopt.cli import meta_train
from gmn_lopt.evaluation import paper
from gmn_lopt.util.errors import UsageError


def config(out, **changes):
    few = {"task": "digits_mlp", "optimizers": ("sgdm",), "stages": ("nres", "truncated:truncation=10")}
    return Config(out=out, **few | {"inner_steps": 2000, "seeds": 2, "eval_seeds": 2} | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("estimators")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "LEARNING_RATES", (0.001, 0.01))
        yield out, main(config(out, horizon=50))


def test_report(finished):
    out, text = finished
    assert (out / "report.md").read_text() == f"# digits_mlp\n\n{text}\n"
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert head == list(estimators.HEAD)
    assert [row[0] for row in rows] == ["tuned Adam", "sgdm nres", "sgdm truncated:truncation=10"]
    assert [row[5] for row in rows[1:]] == ["3,200", "2,080"], "not the first meta-step past the budget"
    report = json.loads((out / "evaluation" / "report.json").read_text())
    losses = [row["mean_training_loss"]["mean"] for row in report["optimizers"][1:3]]
    assert rows[1][1].startswith(f"{sum(losses) / 2:.4f} ± "), "not the mean over the first variant's meta-seeds"
    assert losses[0] != losses[1]
    assert rows[1][4].endswith("/4")


def test_a_finished_run_is_not_done_again(finished, monkeypatch):
    out, text = finished
    monkeypatch.setattr(meta_train, "train", lambda *args: pytest.fail("done again"))
    again = main(config(out, horizon=50))
    # Time per step, which is measured anew with other optimizers, is not in the table.
    assert again == text
    with pytest.raises(pytest.fail.Exception, match="done again"):
        main(config(out, horizon=50, stages=("nres:pairs=4",)))


def test_a_run_that_a_signal_ends_ends_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(meta_train, "main", lambda run: False)
    with pytest.raises(KeyboardInterrupt):
        main(config(tmp_path))


def test_stages_share_the_budget(tmp_path):
    settings = config(tmp_path, inner_steps=10_000, learning_rate=0.01)
    variant = make_variant(settings, "ds", "truncated:truncation=25,pairs=8 pes:pairs=16")
    assert [stage.meta_steps for stage in variant.training.stages] == [25, 4]  # of 200 and of 1600 inner steps
    assert [stage.learning_rate for stage in variant.training.stages] == [0.01, 0.01]


def test_every_ablation_can_be_made(tmp_path):
    made = [make_variant(config(tmp_path), name, stages) for name in ("ds", *ABLATIONS) for stages in Config.stages]
    assert len({repr(variant.training.optimizer) for variant in made}) == 1 + len(ABLATIONS)
    assert len({variant.run(0).out for variant in made}) == len(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizers": ("rnn",)}, "rnn with stages 'nres': unknown recipe; choose one of sgdm"),
        ({"stages": ("best",)}, "unknown estimator 'best'"),
        ({"task": "mnist"}, "unknown task 'mnist'"),
        ({"horizon": 70}, "sgdm with stages 'nres': truncation 50 does not divide"),
        ({"seeds": 0}, "--seeds must be at least 1"),
    ],
)
def test_wrong_input_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(UsageError) as error:
        main(config(tmp_path, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
