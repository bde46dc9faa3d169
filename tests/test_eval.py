"""The evaluation from the command line to the report: resuming, refusing, and what is written."""

import json
import os
import queue
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import gmn_lopt
from gmn_lopt.cli import command_line
from gmn_lopt.cli import eval as command
from gmn_lopt.evaluation import evaluate as evaluation
from gmn_lopt.evaluation import plots, runs
from gmn_lopt.evaluation.timing import Timing
from gmn_lopt.meta.task import Task
from gmn_lopt.networks.gradmetanet import GradMetaNetConfig
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.optimizers.residual import Residual
from gmn_lopt.optimizers.saved import digest, load, save
from gmn_lopt.optimizers.set_reader import SetReader
from gmn_lopt.util.errors import UsageError

LION = "optax:lion:learning_rate=0.05"


def two_weights() -> Task:
    x = jax.random.normal(jax.random.key(1), (40, 2)) * jnp.array([1.0, 0.3])
    return Task(
        name="two_weights",
        horizon=6,
        batch_size=8,
        loss_cap=10.0,
        data={"train": x[:30], "valid": x[:15], "test": x[30:]},
        init=lambda key: {"w": jax.random.normal(key, (2,))},
        loss=lambda params, batch: jnp.mean((batch @ params["w"]) ** 2),
        sample=lambda key, split: jax.random.choice(key, split, (8,)),
    )


TASK = two_weights()  # made once: its functions are what compiled programs are found by


@pytest.fixture(autouse=True)
def task(monkeypatch):
    monkeypatch.setattr(command, "load_task", lambda name, data_dir: TASK)
    monkeypatch.setattr(command, "task_file", lambda name: Path(__file__))


@pytest.fixture(autouse=True)
def listening():
    """Ctrl-C is heard, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def trained(monkeypatch):
    """The names of the optimizers that have been trained, in order."""
    names: list[str] = []
    train = runs.training_curves

    def count(task, candidate, *args, **kwargs):
        names.append(candidate.name)
        return train(task, candidate, *args, **kwargs)

    monkeypatch.setattr(runs, "training_curves", count)
    return names


def config(out: Path, *optimizers: str, **changes) -> command.Config:
    few = {"seeds": 2, "protocol": "paper", "trials_at_once": 10, "timing_rounds": 2}
    return command.Config(**{"task": "two_weights", "out": out, "optimizer": optimizers} | few | changes)


def without_pictures(monkeypatch):
    monkeypatch.setattr(plots, "draw_curves", lambda *_: Figure())
    monkeypatch.setattr(plots, "plot_trajectories", lambda *_: None)


def without_times(report):
    report = json.loads(json.dumps(report))
    del report["timing"]
    for row in report["optimizers"]:
        del row["seconds_per_step"], row["training_time_speed_up"]
        for seed in row["seeds"]:
            del seed["training_time_speed_up"]
    return report


def test_report_and_pictures_are_written(tmp_path, capsys):
    report = command.main(config(tmp_path, LION, "slow=optax:sgd:learning_rate=1e-6"))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert [row["name"] for row in report["optimizers"]] == ["adam", "lion(learning_rate=0.05)", "slow"]
    lion, slow = report["optimizers"][1:]
    assert lion["misses"] == 0
    assert lion["step_reduction"]["mean"] > 1.5  # its steps are five times as long as the longest of Adam's
    assert slow["misses"] == 2
    printed = capsys.readouterr().out
    assert "— (2 of 2 missed)" in printed
    for name in ("report.json", "report.md", "curves.png", "trajectories.png"):
        assert str(tmp_path / name) in printed
        assert (tmp_path / name).stat().st_size > 500
    assert "every step" in (tmp_path / "report.md").read_text()
    assert np.shape(report["curves"]["test_loss"]["slow"]) == (2, 6)


def test_a_second_run_computes_only_what_is_new(tmp_path, trained):
    first = command.main(config(tmp_path, LION))
    assert trained == ["adam", "adam", "lion(learning_rate=0.05)"]
    assert command.main(config(tmp_path, LION)) == first
    assert len(trained) == 3
    other = f"other={LION.replace('5', '6')}"
    more = command.main(config(tmp_path, other, LION))
    assert trained[3:] == ["other"]
    assert without_times(more)["optimizers"][2] == without_times(first)["optimizers"][1]
    # The same name for another optimizer: computed again.
    command.main(config(tmp_path, f"other={LION.replace('5', '7')}"))
    assert trained[4:] == ["other"]


def test_an_interrupted_evaluation_resumes(tmp_path, trained, monkeypatch, capfd):
    train, ended = runs.training_curves, queue.Queue()

    def interrupt(task, candidate, *args, **kwargs):
        if len(trained) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            sys.exit(ended.get(timeout=60))  # the command ends from another thread
        return train(task, candidate, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "training_curves", interrupt)
        with pytest.raises(KeyboardInterrupt):
            command.main(config(tmp_path / "a", LION))
        arguments = f"--task two_weights --out {tmp_path / 'a'} --seeds 2 --protocol paper --trials-at-once 10".split()
        patch.setattr(command_line.os, "_exit", ended.put)
        with pytest.raises(SystemExit) as exit_:
            command.cli([*arguments, "--optimizer", LION])
    assert exit_.value.code == 130
    said = capfd.readouterr().err.splitlines()
    assert f"gmn-eval: interrupted; the same command goes on from what is in {tmp_path / 'a'}" in said
    resumed = command.main(config(tmp_path / "a", LION))
    assert trained == ["adam", "adam", "lion(learning_rate=0.05)"]
    assert without_times(resumed) == without_times(command.main(config(tmp_path / "b", LION)))


def test_learned_optimizers_come_from_a_run_a_directory_and_its_stages(tmp_path, trained, monkeypatch):
    # Only the training is of interest here, and compiling takes its time.
    monkeypatch.setattr(
        evaluation, "time_per_step", lambda task, everyone, **_: Timing(np.ones((len(everyone), 2)), False, 0.0)
    )
    without_pictures(monkeypatch)
    params, batch = TASK.init(jax.random.key(0)), TASK.sample(jax.random.key(0), TASK.data["train"])
    structure = gmn_lopt.analyze(TASK.loss, params, batch)
    small = GradMetaNetConfig(width=4, set_layers=1, neuron_layers=0)
    lopt = LearnedOptimizer(structure, residual=Residual(gradmetanet=SetReader(small)))
    for seed, place in enumerate(("run/optimizer", "saved")):
        save(str(tmp_path / place), lopt, lopt.init(jax.random.key(seed)))
    specs = (str(tmp_path / "run"), f"after truncated={tmp_path / 'saved'}")
    report = command.main(config(tmp_path / "out", *specs))
    assert [row["name"] for row in report["optimizers"]] == ["adam", "run", "after truncated"]
    assert [row.get("digest") for row in report["optimizers"]] == [
        None,
        *(digest(lopt.init(jax.random.key(seed))) for seed in (0, 1)),
    ]
    curves = report["curves"]["test_loss"]
    assert curves["run"] != curves["after truncated"]

    # By hand, with the public interface.
    initialisation, batches = jax.random.split(jax.random.key(0))
    params, tx = TASK.init(initialisation), load(tmp_path / "saved", structure)
    state = tx.init(params)

    @jax.jit
    def step(params, state, t):
        batch = TASK.sample(jax.random.fold_in(batches, t), TASK.data["train"])
        _, grads, factors = gmn_lopt.value_grad_and_factors(TASK.loss)(params, batch)
        updates, state = tx.update(grads, state, params, factors=factors)
        return jax.tree.map(jnp.add, params, updates), state

    for t in range(2):
        params, state = step(params, state, t)
        np.testing.assert_allclose(curves["after truncated"][0][t], TASK.loss(params, TASK.data["test"]), rtol=1e-4)

    # Trained further at the same place: computed again, and only that one.
    save(str(tmp_path / "saved"), lopt, lopt.init(jax.random.key(9)))
    trained.clear()
    command.main(config(tmp_path / "out", *specs))
    assert trained == ["after truncated"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ("--seeds 0", "--seeds must be at least 1"),
        ("--seeds -1", "--seeds must be at least 1"),
        ("--first-seed -1", "--first-seed"),
        ("--horizon 0", "--horizon must be at least 1"),
        ("--eval-every 4", "does not divide the horizon of 6 steps"),
        ("--smoothing 0", "--smoothing must be at least 1"),
        ("--optimizer adamw=optax:sgd:learning_rate=1", "'adamw' is taken"),
        ("--protocol paper --optimizer adam=optax:sgd:learning_rate=1", "'adam' is taken"),
        ("--trials-at-once 0", "--trials-at-once must be at least 1"),
        ("--baseline lion", "--baseline 'lion': there are adamw, nadamw, muon, soap, kron"),
        ("--protocol paper --baseline adamw", "--baseline is for --protocol fair"),
        ("--protocol mine", "--protocol"),
        (f"--optimizer {LION} --optimizer {LION}", "is taken"),
        ("--optimizer /no/such/place", "/no/such/place"),
        ("--optimizer tests", "config.json"),
        ("--seeds three", "three"),
        ("--task two_weights:hidden=1.2.3", "--task 'two_weights:hidden=1.2.3': write two_weights:setting=value"),
        ("--task two_weights:hidden=6,hidden=7", "each setting once"),
        ("--transfer two_weights:a=", "--transfer 'two_weights:a=': write two_weights:setting=value"),
        ("--transfer two_weights --transfer two_weights", "give each task once"),
        ("--speed 3", "--speed"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, capsys, changes, says):
    try:
        code = command.cli(["--task", "two_weights", "--out", str(tmp_path), *changes.split()])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_settings_of_the_task(tmp_path, monkeypatch, capsys):
    given = {}

    def load_task(name, data_dir, **settings):
        given.update(settings)
        return TASK

    monkeypatch.setattr(command, "load_task", load_task)
    task = "two_weights:hidden=64, widths=(3, 4), augment=False, data=wine"
    report = command.main(config(tmp_path, task=task))
    assert given == {"hidden": 64, "widths": (3, 4), "augment": False, "data": "wine"}
    assert report["settings"]["task_settings"] == given | {"widths": [3, 4]}
    title = (tmp_path / "report.md").read_text().splitlines()[0]
    assert title.startswith("# two_weights (hidden=64, widths=3x4, augment=False, data=wine): ")
    assert command.main(config(tmp_path, task=task.replace(" ", "")))["settings"] == report["settings"]
    with pytest.raises(UsageError, match=r"task_settings was .*, is None"):
        command.main(config(tmp_path))


def test_the_validation_split_may_stand_for_the_test_split(tmp_path):
    losses = {}
    for split in ("test", "valid"):
        report = command.main(config(tmp_path / split, split=split))
        losses[split] = report["optimizers"][0]["best_test_loss"]
        assert report["settings"].get("split", "test") == split
    assert losses["test"] != losses["valid"]
    assert "on the valid split" in (tmp_path / "valid" / "report.md").read_text().splitlines()[0]


def test_transfer_is_one_command(tmp_path, monkeypatch, capsys):
    """Each task with a report of its own, the same as if evaluated alone, and one table of all."""
    steeper = replace(TASK, loss=lambda params, batch: TASK.loss(params, 2 * batch))
    given = []

    def load_task(name, data_dir, **settings):
        given.append((name, settings))
        return steeper if settings else TASK

    monkeypatch.setattr(command, "load_task", load_task)
    monkeypatch.setattr(
        evaluation, "time_per_step", lambda task, everyone, **_: Timing(np.ones((len(everyone), 2)), False, 0.0)
    )
    without_pictures(monkeypatch)
    transfers = ("two_weights:scale=2, dims=(3, 4)", "two_weights:scale='a/b'")
    report = command.main(config(tmp_path / "out", LION, transfer=transfers))
    assert given == [
        ("two_weights", {}),
        ("two_weights", {"scale": 2, "dims": (3, 4)}),
        ("two_weights", {"scale": "a/b"}),
    ]
    places = sorted(path.name for path in (tmp_path / "out" / "transfer").iterdir())
    assert places == ["two_weights,scale=2,dims=-3,4-", "two_weights,scale=a-b"]
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    there = json.loads((tmp_path / "out" / "transfer" / places[0] / "report.json").read_text())
    assert there["curves"]["test_loss"] != report["curves"]["test_loss"]
    alone = command.main(config(tmp_path / "alone", LION, task="two_weights:scale=2,dims=(3, 4)"))
    assert alone == there

    rows = (tmp_path / "out" / "transfer.md").read_text().splitlines()[4:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["two_weights", "two_weights (scale=2, dims=3x4)", "two_weights (scale=a/b)"]
    for row, found in zip(cells, (report, there)):
        assert row[1] == f"{found['baseline']['learning_rate']:g}"
        assert row[2].startswith(f"{found['optimizers'][1]['step_reduction']['mean']:.2f} ± ")
    assert "\n".join(rows) in capsys.readouterr().out


def test_a_transfer_that_cannot_be_done_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    arguments = ["--task", "digits_mlp", "--out", str(tmp_path)]
    for transfer, says in (("digits_mlp:depth=3", "no setting depth"), ("linear_regression", "does not divide")):
        assert command.cli([*arguments, "--transfer", transfer, "--eval-every", "20"]) == 2
        assert says in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.npz"))  # no results


def test_a_part_of_the_test_split_is_named_and_as_large_for_validation(tmp_path, monkeypatch):
    part = replace(TASK, data={**TASK.data, "test": TASK.data["test"][:5]}, test_subset="5 pairs of numbers")
    for split in ("test", "valid"):
        problem = evaluation.prepare(part, (), tmp_path / split, config(tmp_path, split=split))
        expected = TASK.data["test"][:5] if split == "test" else TASK.data["valid"][::3]
        np.testing.assert_array_equal(problem.task.data["test"], expected)
        evaluation.evaluate(problem)
        said = (tmp_path / split / "report.md").read_text()
        assert f"test loss on 5 pairs of numbers, a fixed part of the {split} split" in said


def test_results_depend_on_the_files_that_a_task_is_made_of(monkeypatch, tmp_path):
    monkeypatch.undo()
    own, other = tmp_path / "task.py", tmp_path / "model.py"
    own.write_text("a = 1")
    other.write_text("def loss(params, batch): ...")
    names: dict = {}
    exec(compile(other.read_text(), str(other), "exec"), names)
    task = replace(TASK, loss=names["loss"])
    digests = {evaluation._file_digest(TASK, ()), evaluation._file_digest(task, [own])}
    for file in (own, other):
        file.write_text(file.read_text() + "\n")
        digests.add(evaluation._file_digest(task, [own]))
    assert len(digests) == 4
    assert command.task_file("digits_mlp").name == "digits_mlp.py"
    assert command.task_file("gmn_lopt.meta.task:Task").name == "task.py"


def test_settings_reach_the_task(monkeypatch, tmp_path):
    monkeypatch.undo()
    task = command.problem_of(config(tmp_path), tmp_path, "--task", "digits_mlp", {"hidden": 7, "batch_size": 5}).task
    assert [layer["kernel"].shape for layer in task.init(jax.random.key(0)).values()] == [(64, 7), (7, 10)]
    assert task.batch_size == 5
    for settings, says in (({"depth": 3}, "no setting depth; it has: hidden"), ({"hidden": "wide"}, "digits_mlp")):
        with pytest.raises(UsageError, match=says):
            command.problem_of(config(tmp_path), tmp_path, "--task", "digits_mlp", settings)


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path, capsys):
    command.main(config(tmp_path))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert command.cli(["--task", "two_weights", "--out", str(tmp_path), "--protocol", "paper", "--seeds", "3"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"seeds was \[0, 1\], is \[0, 1, 2\]", error)
    assert error.count("\n") == 1
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_unknown_tasks_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.undo()
    for name in ("digits", "_cache", "../tasks/digits_mlp"):
        assert command.cli(["--task", name, "--out", str(tmp_path)]) == 2
        assert "digits_mlp" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
