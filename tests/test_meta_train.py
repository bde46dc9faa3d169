import dataclasses
import errno
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache

import gmn_lopt
from gmn_lopt.cli import meta_train
from gmn_lopt.cli.meta_train import from_command_line, to_command_line
from gmn_lopt.meta.config import Config, from_json, to_json
from gmn_lopt.meta.presets import BEST, PAPER
from gmn_lopt.meta.run_directory import RunDirectory, RunError, differences
from gmn_lopt.meta.stages import Stage, parse_stage
from gmn_lopt.networks import PointwiseMLP
from gmn_lopt.optimizers.recipes import RECIPES
from gmn_lopt.optimizers.saved import load_learned
from gmn_lopt.tasks import load_task
from gmn_lopt.util.errors import UsageError
from gmn_lopt.util.hardware import usable_cores

ROOT = Path(__file__).parent.parent
STAGES = (
    "truncated:meta_steps=40,learning_rate=1e-2,truncation=5,pairs=4,schedule=cosine",
    "nres:meta_steps=40,learning_rate=1e-2,truncation=2,pairs=3",
)
TWO_STEPS = parse_stage("pes:meta_steps=2,learning_rate=1e-2,truncation=5,pairs=2")
FLAGS = ("task", "out", "log_every", "checkpoint_every", "keep", "keep_every")


def config(out, **changes):
    stages = tuple(parse_stage(text) for text in STAGES)
    defaults = {"task": "linear_regression", "optimizer": RECIPES["sgdm"], "stages": stages, "log_every": 4}
    return Config(out=out, **{**defaults, "checkpoint_every": 6, "keep": 2, "keep_every": 4, **changes})


def arguments(settings):
    flags = [arg for n in FLAGS for arg in (f"--{n.replace('_', '-')}", str(getattr(settings, n)))]
    return ["--optimizer", "sgdm", *[f"--stage={text}" for text in STAGES], *flags]


def phi_of(path):
    task = load_task("linear_regression")
    batch = task.sample(jax.random.key(0), task.data["train"])
    return load_learned(path, gmn_lopt.analyze(task.loss, task.init(jax.random.key(0)), batch))[1]


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Keep what is compiled, also for the processes that the tests start: the runs differ in settings of no effect."""
    names = "jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    values = (True, str(tmp_path_factory.mktemp("compiled")), 0.0)
    before = [getattr(jax.config, name) for name in names]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(names, values):
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in zip(names, before):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert meta_train.main(config(out)) is True
    return out


def test_run_directory(finished):
    settings = json.loads((finished / "config.json").read_text())["settings"]
    assert from_json(settings) == config(finished)
    steps = [row["meta_step"] for row in rows(finished)]
    assert steps == sorted({*range(4, 81, 4), *range(6, 81, 6)})
    for row in rows(finished):
        assert {"loss", "gradient_norm", "gradient_noise", "alpha", "mu", "inner_steps_per_second"} <= row.keys()
        assert len(row["truncation_loss"]) == (2 if row["meta_step"] <= 40 else 5)
    assert rows(finished)[-1]["loss"] < rows(finished)[0]["loss"]
    assert {int(path.name) for path in (finished / "checkpoints").iterdir()} == {24, 48, 72, 78, 80}, "4th and latest 2"
    assert any((finished / "events").iterdir())
    assert (finished / "COMPLETE").read_text() == "80\n"
    saved = ocp.StandardCheckpointer().restore(finished / "checkpoints" / "80" / "default")
    loaded = phi_of(finished / "optimizer")
    jax.tree.map(np.testing.assert_array_equal, saved["phi"]["step_size"], loaded["step_size"])
    first = phi_of(finished / "stages" / "1-truncated")
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(loaded)))


def interrupt(command, out, after, number):
    """Start a process, wait until it has logged so many rows and a random moment more, and send it a signal."""
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= after):
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.2))
    process.send_signal(number)
    _, stderr = process.communicate()
    return process.returncode, stderr


def test_killed_and_stopped_runs_end_like_one_that_was_not(finished, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "meta_train.py", *arguments(config(out))]
    code, stderr = interrupt(command, out, 5, signal.SIGKILL)
    assert code == -signal.SIGKILL, stderr
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"meta_step": 79, "lo')  # as if killed within a line

    # Of the settings, only the directory has to be named again.
    command = [sys.executable, "meta_train.py", "--out", str(out), "--resume"]
    code, stderr = interrupt(command, out, 20, signal.SIGTERM)
    assert code == 0, stderr
    assert "interrupted at meta-step" in stderr
    assert "Traceback" not in stderr
    assert not (out / "COMPLETE").exists()
    last = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    assert f"interrupted at meta-step {last} of 80" in stderr, "the checkpoint is not of the last meta-step"

    assert meta_train.main(config(out, resume=True)) is True
    for name in ("optimizer", "stages/1-truncated", "stages/2-nres"):
        jax.tree.map(np.testing.assert_array_equal, phi_of(out / name), phi_of(finished / name))
    restore = ocp.StandardCheckpointer().restore
    states = [restore(run / "checkpoints" / "80" / "default") for run in (out, finished)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    steps = [row["meta_step"] for row in rows(out)]
    assert steps == sorted(set(steps))
    # The row at `last` was written because of the signal; it and the next average over fewer meta-steps.
    same = {row["meta_step"]: row for row in rows(finished)}
    for before, row in zip([{"meta_step": 0}, *rows(out)], rows(out)):
        if row["meta_step"] in same and last not in (before["meta_step"], row["meta_step"]):
            assert row["loss"] == same[row["meta_step"]]["loss"]


def test_complete_run(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert meta_train.main(config(finished, resume=True)) is True
    assert "is complete" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_contradicting_settings_are_refused(finished):
    recipe = dataclasses.replace(RECIPES["ds"], step_size=gmn_lopt.Constant(0.5))
    stages = (config(finished).stages[0], parse_stage(STAGES[1] + ",sigma=0.5"))
    changed = config(finished, resume=True, optimizer=recipe, stages=stages, seed=3, log_every=7)
    with pytest.raises(RunError) as error:
        meta_train.main(changed)
    message = str(error.value)
    assert (
        "optimizer.step_size.initial was 0.1, now 0.5; seed was 0, now 3; stages[1].sigma was 0.01, now 0.5" in message
    )
    assert "log_every" not in message
    with pytest.raises(RunError, match="not empty; add --resume"):
        meta_train.main(config(finished))


def test_differences_are_named():
    assert differences({"a": [1, {"b": 2}], "c": 3}, {"a": [1, {"b": 4}], "c": 3}) == ["a[1].b was 2, now 4"]
    assert differences({"a": None}, {"a": {"b": 1}}) == ["a was None, now {'b': 1}"]
    assert differences({"a": {"name": "A", "x": 1}}, {"a": {"name": "B"}}) == ["a was A, now B"]
    assert differences([1], [1, 2], "a") == ["a was [1], now [1, 2]"]


def test_a_full_disk_leaves_earlier_checkpoints_intact(tmp_path, monkeypatch, finished):
    out, save = tmp_path / "run", ocp.CheckpointManager.save

    def full(self, step, *args, **kwargs):
        if step == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(RunError, match=r"checkpoint of meta-step 12.*No space left on device; earlier checkpoints"):
            meta_train.main(config(out))
    assert (out / "checkpoints" / "6").is_dir()
    assert meta_train.main(config(out, resume=True)) is True
    jax.tree.map(np.testing.assert_array_equal, phi_of(out / "optimizer"), phi_of(finished / "optimizer"))


def test_one_process_per_directory(tmp_path):
    run = RunDirectory(tmp_path, {}, {}, False, (), 1, 1)
    with pytest.raises(RunError, match="in use by another process"):
        RunDirectory(tmp_path, {}, {}, True, (), 1, 1)
    run.close()
    RunDirectory(tmp_path, {}, {}, True, (), 1, 1).close()


@pytest.mark.parametrize(("optimizer", "layer"), [("denoised+ds+gmn", "trunk"), ("unf+gmn++", "trunk")])
def test_networks_are_meta_trained(tmp_path, optimizer, layer):
    small = [f"--optimizer.residual.{name}=4" for name in ("network.width", "gradmetanet.network.width")]
    given = ["--task", "linear_regression", "--out", str(tmp_path / "run"), "--optimizer", optimizer, *small]
    settings = from_command_line(None, [*given, "--stage", "pes:meta_steps=2,truncation=5,pairs=2"])
    assert meta_train.main(settings) is True
    assert {"alpha", "beta"} <= rows(tmp_path / "run")[0].keys()
    phi = phi_of(tmp_path / "run" / "optimizer")
    assert ("layer" in phi["residual"]["network"]) == optimizer.startswith("unf")
    assert ("blocks_0" in phi["residual"]["gradmetanet"][layer]) == optimizer.endswith("++")


def test_unf_is_not_trained_on_models_of_several_structures(tmp_path, monkeypatch):
    monkeypatch.setattr(meta_train, "make_all", lambda _: [load_task("linear_regression"), load_task("digits_mlp")])
    with pytest.raises(
        UsageError, match="--task 'mixture': unf belongs to one model, but the tasks have several; train ds"
    ):
        meta_train.make_problem(config(tmp_path, task="mixture", optimizer=RECIPES["unf"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--task", "mnist"], "unknown task 'mnist'"),
        (["--task", "a\nb"], "--task 'a\\nb'"),
        (["--task", "linear_regression:sides=3"], "has no setting sides"),
        (["--optimizer", "rnn"], "'rnn'"),
        (["--preset", "worst"], "'worst'"),
        (["--stage", "pes"], "truncation 50 does not divide the horizon 10; choose a divisor"),
        (["--horizon", "7"], "does not divide the horizon 7"),
        (["--stage", "pes:meta_steps=-5"], "Stage.meta_steps must be a whole number of at least 1"),
        (["--keep", "0"], "Config.keep must be a whole number of at least 1"),
        (["--seed", "many"], "many"),
        (["--optimizer.step-size.initial", "0"], "Constant.initial must be positive"),
        (["--optimizer.residual.network.width", "8"], "--optimizer.residual.network.width"),
        (["--meta-loss", "test"], "test"),
        (["--no-such-flag"], "no-such-flag"),
        (["--start", "none"], "neither a directory nor a shipped optimizer"),
        (["--start", "default"], "--start brings an optimizer, and --optimizer another"),
        (["--out", f"{__file__}/run"], "choose a directory that can be written"),
        (["--out", str(ROOT), "--resume"], "is not the directory of a run"),
    ],
)
def test_wrong_input_ends_in_one_line(tmp_path, capsys, changes, message):
    out = tmp_path / "run"
    given = arguments(config(out))
    if changes == ["--start", "none"]:
        given = given[2:]  # without --optimizer
    try:
        code = meta_train.cli([*given, *changes])
    except SystemExit as error:  # from the parser
        code = error.code
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not out.exists()


def test_a_run_starts_from_a_saved_optimizer(finished, tmp_path):
    start = str(finished / "optimizer")
    # A meta-learning rate of next to nothing: what comes out is what went in.
    few = {"stages": (dataclasses.replace(TWO_STEPS, learning_rate=1e-12),), "start": start, "seed": 7}
    assert meta_train.main(config(tmp_path / "on", **few)) is True
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), phi_of(tmp_path / "on" / "optimizer"), phi_of(start)
    )
    changed = dataclasses.replace(RECIPES["sgdm"], step_size=gmn_lopt.Constant(0.2))
    for changes, says in (({"optimizer": changed}, "initial was 0.1, now 0.2"), ({"start": "none"}, "neither")):
        with pytest.raises(UsageError, match=says):
            meta_train.main(config(tmp_path / "refused", **{**few, **changes}))
    assert not (tmp_path / "refused").exists()
    given = from_command_line(None, ["--task", "digits_mlp", "--out", "x", "--start", "default"])
    assert given.optimizer == RECIPES["default"]


def test_a_task_has_settings(tmp_path):
    settings = from_command_line(None, ["--task", "digits_mlp:hidden=8,horizon=20", "--out", str(tmp_path)])
    _, problem = meta_train.make_problem(settings)
    assert problem.horizon == 20 and problem.task.init(jax.random.key(0))["layer_0"]["kernel"].shape[1] == 8


def test_cores_are_counted_where_there_is_no_affinity(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert usable_cores() == 7


def test_presets():
    assert BEST.optimizer == RECIPES["denoised+ds+gmn"] and PAPER.stages == (Stage(),)
    assert PAPER.optimizer.residual.network == PointwiseMLP(32, 3)
    given = ["--task", "digits_mlp", "--out", "x"]
    here = {"task": "digits_mlp", "out": Path("x")}
    assert from_command_line(None, given) == dataclasses.replace(BEST, **here)
    paper = from_command_line(None, ["--preset=paper", *given, "--seed", "3"])
    assert paper == dataclasses.replace(PAPER, seed=3, **here)
    for settings in (BEST, paper):
        assert from_json(json.loads(json.dumps(to_json(settings)))) == settings


def test_single_fields_of_an_optimizer_are_overridden():
    given = ["--task", "digits_mlp", "--out", "x", "--optimizer", "ds+gmn", "--optimizer.residual.network.width", "16"]
    found = from_command_line(
        None, [*given, "--optimizer.step-size.initial=2", "--optimizer.rule.bound", "1"]
    ).optimizer
    residual = dataclasses.replace(RECIPES["ds+gmn"].residual, network=PointwiseMLP(16, 3))
    expected = gmn_lopt.Recipe(residual=residual, rule=gmn_lopt.Additive(1.0), step_size=gmn_lopt.Constant(2.0))
    assert found == dataclasses.replace(expected, direction=RECIPES["ds+gmn"].direction)


@pytest.mark.parametrize("changed", [{}, {"seed": 3, "horizon": 20, "data_dir": "a b", "meta_loss": "validation"}])
def test_every_configuration_has_its_command_line(changed):
    reader = gmn_lopt.SetReader(gmn_lopt.GradMetaNetConfig(width=8), decays=(0.5, 0.9), max_output_size=None)
    wide = gmn_lopt.Residual(gradmetanet=reader, output_scale=0.5)
    for optimizer in (*RECIPES.values(), gmn_lopt.Recipe(residual=wide, step_size=gmn_lopt.Constant(0.3))):
        settings = dataclasses.replace(config(Path("x"), optimizer=optimizer), **changed)
        assert from_command_line(None, to_command_line(settings)) == settings
    started = config(Path("x"), start="default", optimizer=RECIPES["default"])
    assert from_command_line(None, to_command_line(started)) == started
    with pytest.raises(ValueError, match="no recipe has the parts"):
        to_command_line(config(Path("x"), optimizer=gmn_lopt.Recipe(gmn_lopt.Muon(), wide)))


def test_a_resumed_run_has_its_own_settings(finished):
    assert from_command_line(None, ["--out", str(finished), "--resume"]) == config(finished, resume=True)
    again = from_command_line(None, [*arguments(config(finished)), "--resume"])
    assert again == config(finished, resume=True)
    other = from_command_line(None, ["--out", str(finished), "--resume", "--preset", "paper"])
    assert (other.optimizer, other.stages, other.task) == (PAPER.optimizer, PAPER.stages, "linear_regression")


def test_settings_of_another_version_are_refused(finished, tmp_path):
    settings = to_json(config(tmp_path)) | {"width": 8}
    with pytest.raises(UsageError, match="another version of this program: settings has the unknown entry 'width'"):
        from_json(settings)
