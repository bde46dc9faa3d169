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
import meta_train
from gmn_lopt.meta.config import PRESETS, Config, UsageError, from_command_line, from_json, make_stages, to_json
from gmn_lopt.meta.run_directory import RunDirectory, RunError
from gmn_lopt.optimizers.saved import load_learned
from gmn_lopt.tasks import load_task

ROOT = Path(meta_train.__file__).parent
STAGES = "truncated:40:1e-2:K=5:n=4:schedule=cosine:ema=0.9,nres:40:1e-2:K=2:n=3:warmup=5:ema=0.8"


def config(out, **changes):
    defaults = {"task": "linear_regression", "optimizer": "sgdm", "stages": STAGES, "log_every": 4}
    return Config(out=out, **{**defaults, "checkpoint_every": 6, "keep": 2, "keep_every": 4, **changes})


def arguments(settings):
    names = ("task", "optimizer", "out", "stages", "log_every", "checkpoint_every", "keep", "keep_every")
    return ["--preset", "paper"] + [
        arg for n in names for arg in (f"--{n.replace('_', '-')}", str(getattr(settings, n)))
    ]


def phi_of(path):
    task = load_task("linear_regression")
    batch = task.sample(jax.random.key(0), task.data["train"])
    return load_learned(path, gmn_lopt.analyze(task.loss, task.init(jax.random.key(0)), batch))[1]


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Keep what is compiled, also for the processes that the tests start: the runs differ in settings of no effect."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    values = (str(tmp_path_factory.mktemp("compiled")), 0.0)
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
    assert json.loads((finished / "config.json").read_text())["settings"]["stages"] == STAGES
    steps = [row["meta_step"] for row in rows(finished)]
    assert steps == sorted({*range(4, 81, 4), *range(6, 81, 6)})
    for row in rows(finished):
        assert {"loss", "gradient_norm", "gradient_noise", "alpha", "mu", "inner_steps_per_second"} <= row.keys()
        assert len(row["window_loss"]) == (2 if row["meta_step"] <= 40 else 5)
    assert rows(finished)[-1]["loss"] < rows(finished)[0]["loss"]
    assert {int(path.name) for path in (finished / "checkpoints").iterdir()} == {24, 48, 72, 78, 80}, "4th and latest 2"
    assert any((finished / "events").iterdir())
    assert (finished / "COMPLETE").read_text() == "80\n"
    saved = ocp.StandardCheckpointer().restore(finished / "checkpoints" / "80" / "default")
    loaded = phi_of(finished / "optimizer")
    # What is saved is the average, not the last meta-parameters.
    jax.tree.map(np.testing.assert_array_equal, saved["optimizer"][-1]["average"], loaded)
    assert saved["phi"]["log_alpha"] != loaded["log_alpha"]
    assert abs(saved["phi"]["log_alpha"] - loaded["log_alpha"]) < 0.1
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
    changed = config(finished, resume=True, sigma=0.5, optimizer="ds", seed=3, log_every=7)
    with pytest.raises(RunError) as error:
        meta_train.main(changed)
    message = str(error.value)
    assert "optimizer was 'sgdm', now 'ds'; seed was 0, now 3; sigma was 0.01, now 0.5" in message
    assert "log_every" not in message
    with pytest.raises(RunError, match="not empty; add --resume"):
        meta_train.main(config(finished))


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


@pytest.mark.parametrize("optimizer", ["ds+gmn", "unf+gmn++"])
def test_networks_are_meta_trained(tmp_path, optimizer):
    small = dataclasses.replace(Config.__dataclass_fields__["gmn"].default_factory(), width=4, product_width=4)
    settings = config(tmp_path / "run", optimizer=optimizer, stages="pes:2:1e-2:K=5:n=2", width=4, gmn=small)
    assert meta_train.main(settings) is True
    assert {"alpha", "beta", "mu"} <= rows(tmp_path / "run")[0].keys()
    phi = phi_of(tmp_path / "run" / "optimizer")
    assert ("layer" in phi["backbone"]) == optimizer.startswith("unf")
    assert ("blocks_0" in phi["gradmetanet"]["trunk"]) == optimizer.endswith("++")


def test_unf_is_not_trained_on_models_of_several_structures(tmp_path, monkeypatch):
    monkeypatch.setattr(meta_train, "make_all", lambda _: [load_task("linear_regression"), load_task("digits_mlp")])
    with pytest.raises(
        UsageError, match="--task mixture: unf belongs to one model, but the tasks have several; train ds"
    ):
        meta_train.make_problem(config(tmp_path, task="mixture", optimizer="unf"))


def test_settings_that_came_later_do_not_keep_a_run_from_being_resumed(tmp_path):
    settings = to_json(config(tmp_path, optimizer="ds+gmn"))
    assert "attention_heads" not in settings["gmn"]
    assert to_json(from_json(settings)) == settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--task", "mnist"], "unknown task 'mnist'"),
        (["--optimizer", "rnn"], "'rnn'"),
        (["--stages", "pes"], "truncation 50 does not divide the horizon 10; choose a divisor"),
        (["--horizon", "7"], "does not divide the horizon 7"),
        (["--stages", "pes:-5"], "meta_steps is -5"),
        (["--keep", "0"], "--keep is 0"),
        (["--pairs", "many"], "many"),
        (["--width", "0"], "width"),
        (["--gmn.width", "0"], "width"),
        (["--meta-loss", "test"], "test"),
        (["--no-such-flag"], "no-such-flag"),
        (["--out", f"{__file__}/run"], "choose a directory that can be written"),
        (["--out", str(ROOT), "--resume"], "is not the directory of a run"),
    ],
)
def test_wrong_input_ends_in_one_line(tmp_path, monkeypatch, capsys, changes, message):
    out = tmp_path / "run"
    argv = [*arguments(config(out)), "--pairs", "2", *changes]
    if "--gmn.width" in changes:
        argv += ["--optimizer", "ds+gmn"]
    monkeypatch.setattr(sys, "argv", ["meta_train.py", *argv])
    try:
        code = meta_train.cli()
    except SystemExit as error:  # from the parser
        code = error.code
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not out.exists()


def test_wrong_input_of_the_function():
    wrong = config(Path("never-made"))
    object.__setattr__(wrong, "optimizer", "rnn")  # the tests check types where users' programs do not
    with pytest.raises(UsageError, match="unknown --optimizer 'rnn'; choose one of sgdm, ds, ds\\+gmn"):
        meta_train.main(wrong)
    assert not Path("never-made").exists()


def test_a_run_starts_from_a_saved_optimizer(finished, tmp_path):
    start = str(finished / "optimizer")
    # A meta-learning rate of next to nothing: what comes out is what went in.
    few = {"stages": "pes:2:1e-12:K=5:n=2", "start": start, "seed": 7}
    assert meta_train.main(config(tmp_path / "on", **few)) is True
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), phi_of(tmp_path / "on" / "optimizer"), phi_of(start)
    )
    for changes, says in (({"base": "adam"}, "base is 'momentum', not 'adam'"), ({"start": "none"}, "neither")):
        with pytest.raises(UsageError, match=says):
            meta_train.main(config(tmp_path / "refused", **{**few, **changes}))
    assert not (tmp_path / "refused").exists()


def test_presets():
    best = from_command_line(None, ["--task", "digits_mlp", "--out", "x"])
    assert best == Config("digits_mlp", Path("x"), preset="best", **PRESETS["best"])
    paper = from_command_line(None, ["--preset=paper", "--task", "digits_mlp", "--out", "x", "--seed", "3"])
    assert paper == Config("digits_mlp", Path("x"), seed=3)
    with pytest.raises(SystemExit):
        from_command_line(None, ["--preset", "worst", "--task", "digits_mlp", "--out", "x"])
    for settings in (best, paper):
        assert from_json(json.loads(json.dumps(to_json(settings)))) == settings
        assert make_stages(settings)
