"""What a run directory holds, and what happens when it is damaged, littered, or on a full disk."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fuzz import runs
from fuzz.outcomes import Refusal, command
from tensorboardX.proto.event_pb2 import Event, SessionLog

from gmn_lopt.cli import eval as evaluation
from gmn_lopt.cli import meta_train
from gmn_lopt.cli.meta_train import from_command_line
from gmn_lopt.meta import metrics
from gmn_lopt.meta.metrics import read_rows
from gmn_lopt.meta.run import check_places
from gmn_lopt.meta.run_directory import RunDirectory, RunError
from gmn_lopt.optimizers.saved import load_recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path):
    runs.make(tmp_path / "run")
    return tmp_path / "run"


def resume(path, *more):
    command(meta_train.cli, ["--out", str(path), "--resume", *more])


@pytest.mark.parametrize("name", ["optimizer", "stages", "stages/0-start", "stages/2-pes"])
def test_what_is_where_optimizers_are_saved_is_named_before_anything_is_computed(tmp_path, name):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    config = from_command_line(None, [*runs.ARGUMENTS, "--stage", "pes:truncation=5", "--out", str(tmp_path / "run")])
    with pytest.raises(RunError, match=f"/run/{name} is not a .*; delete it to continue"):
        check_places(config)
    file.unlink()
    check_places(config)


@pytest.mark.parametrize("task", ["os:system", "planted:make", "learned_optimization:planted:make"])
def test_code_that_only_a_file_names_is_not_executed(run, tmp_path, monkeypatch, task):
    """Whoever writes a run directory can sign it."""
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= {"task": task, "data_dir": "touch planted"}  # what the shell would be given
    del config["checksum"]
    (run / "config.json").write_text(json.dumps(config))
    (tmp_path / "planted.py").write_text("open('planted', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Refusal, match=f"names, {task}; add --task {task} if that is to be executed"):
        resume(run)
    assert not (tmp_path / "planted").exists()
    with pytest.raises(Refusal, match=r"the run in .* has other settings .*task was"):
        resume(run, "--task", "linear_regression")


def opened(path, **settings):
    return RunDirectory(path, settings, {}, True, ("resume",), 1, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "is not the directory of a run: .*config.json is missing"),
        ("config.json", b"{", "config.json is damaged or not JSON: Expecting"),
        ("config.json", b"[1]", "config.json is damaged: it does not hold an object"),
        ("config.json", b'{"settings": 3}', "config.json does not hold the settings of one"),
        ("config.json", b'{"settings": {"name": "Config", "version": 1}}', "config.json is damaged, or of another"),
        ("checkpoints/4", b"a file", "checkpoints/4 is not a directory"),
        (
            "checkpoints/99/x",
            b"",
            "cannot read the checkpoint of meta-step 99|checkpoints/99 is beyond the 4 meta-steps",
        ),
        ("checkpoints/4/default/manifest.ocdbt", b"", "checkpoints/4 is damaged; delete it to continue from"),
        ("optimizer", b"a file", "optimizer is not a saved optimizer; delete it to continue"),
        ("optimizer/mine.txt", b"", "optimizer is not a saved optimizer; delete it to continue"),
        ("checkpoints/4/\udcff", b"", "checkpoints/4 is damaged; delete it to continue from"),
        ("checksums.json", b"[]", "checksums.json is damaged: it does not hold an object; delete it"),
    ],
)
def test_what_is_wrong_is_named(run, name, content, message):
    file = run / name
    if file.is_dir():
        file.rename(run / "elsewhere")
    file.unlink(missing_ok=True)
    if content is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    with pytest.raises(Refusal, match=message) as error:
        runs.read(run)
    assert str(run) in str(error.value)


def test_a_changed_setting_is_seen(run):
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(Refusal, match=r"config.json is damaged: it is not what was written"):
        resume(run)


def test_runs_of_earlier_versions_have_no_checksums(run):
    config = json.loads((run / "config.json").read_text())
    del config["checksum"]
    (run / "config.json").write_text(json.dumps(config))
    (run / "checksums.json").unlink()
    assert runs.read(run)[1] == 4


def test_a_checkpoint_that_was_deleted_is_saved_anew(run, monkeypatch):
    shutil.rmtree(run / "checkpoints" / "4")
    settings = json.loads((run / "config.json").read_text())["settings"]
    with opened(run, **settings) as here:
        assert here.latest == 2
        monkeypatch.setattr(RunDirectory, "_note_checksum", lambda self, *_: None)
        here.save(4, runs.saved_state(7))
    monkeypatch.undo()
    (run / "checkpoints" / "4" / "more").write_text("as the checksum of the first one is noted still")
    with pytest.raises(Refusal, match="4 is damaged; delete it"):
        runs.read(run)
    shutil.rmtree(run / "checkpoints" / "4")
    with opened(run, **settings) as here:
        here.save(4, runs.saved_state(7))
    assert runs.read(run)[2] == runs.digest(runs.saved_state(7))


def test_events_are_those_that_tensorboard_reads(run):
    content = next((run / "events").iterdir()).read_bytes()
    events = []
    while content:
        size = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    assert events[0].file_version == "brain.Event:2" and events[1].session_log.status == SessionLog.START
    values = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    expected = [x for i in range(1, 5) for x in ((i, "loss", np.float32(i / 3)), (i, "truncation_loss/0", 0.5))]
    assert values == expected


def test_resuming_where_nothing_is_asks_for_a_task(tmp_path):
    for place in ("nowhere", "."):
        with pytest.raises(Refusal, match=r"there is no run in --out .* yet; give --task to begin one"):
            resume(tmp_path / place)


@pytest.mark.parametrize("content", ["", "yes\n", "-4\n", "5\n", "4 4\n", "9" * 50])
def test_only_the_last_meta_step_says_that_a_run_is_complete(run, content, capsys):
    (run / "COMPLETE").write_text(content)
    assert runs.read(run)[1] == 4, "it was not resumed"
    (run / "COMPLETE").write_text("4\n")
    assert runs.read(run) == []


def test_a_bad_line_of_metrics_is_left_out_and_named(run, capsys):
    file, bad = run / "metrics.jsonl", [b"\xff\n", b"3\n", b"{}\n", b"[" * 10**5 + b"\n"]
    lines = file.read_bytes().splitlines(keepends=True)
    for text in bad:
        for at, number in ((0, 1), (2, 3), (4, 5)):
            file.write_bytes(b"".join([*lines[:at], text, *lines[at:]]))
            opened(run, **json.loads((run / "config.json").read_text())["settings"]).close()
            assert [row["meta_step"] for row in read_rows(run, 9)] == [1, 2, 3, 4]
            told = capsys.readouterr().err.splitlines()
            assert len(told) == 1 and f"metrics.jsonl: left out a line that cannot be read (line {number}: " in told[0]
    file.write_bytes(b"".join([*lines, b'{"meta_step": 5, "lo']))  # killed while writing
    opened(run, **json.loads((run / "config.json").read_text())["settings"]).close()
    assert capsys.readouterr().err == "" and file.read_bytes() == b"".join(lines)


def test_litter_is_removed_when_a_run_is_opened(tmp_path):
    opened(tmp_path).close()
    gmn = ROOT / "gmn_lopt" / "pretrained" / "default"
    for place in (tmp_path, tmp_path / "stages"):
        (place / ".optimizer.new-abcdefgh").mkdir(parents=True)
        (place / ".optimizer.new-abcdefgh" / ".config.json.12.partial").write_text("half")
        (place / ".config.json.4711.partial").write_text("half")
        (place / ".gitignore").write_text("*")
    # Killed between the renaming of the old directory and that of the new one.
    (tmp_path / ".optimizer.old-abcdefgh").mkdir()
    for file in ("config.json", "phi.safetensors"):
        (tmp_path / ".optimizer.old-abcdefgh" / file).write_bytes((gmn / file).read_bytes())
    opened(tmp_path).close()
    assert {path.name for path in (tmp_path / "stages").iterdir()} == {".gitignore"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".optimizer", ".config"))]
    assert load_recipe(tmp_path / "optimizer") == load_recipe("default")


def test_checkpoints_that_are_not_to_be_kept_go_when_a_run_is_opened(run):
    """As the next one would have removed them, had the process not been killed before."""
    settings = json.loads((run / "config.json").read_text())["settings"]
    for keep_period, left in ((2, {"2", "4"}), (3, {"4"})):
        RunDirectory(run, settings, {}, True, ("resume",), 1, keep_period).close()
        assert {path.name for path in (run / "checkpoints").iterdir()} == left


def test_litter_of_another_process_stays_while_it_has_the_run(tmp_path):
    with opened(tmp_path):
        (tmp_path / ".config.json.4711.partial").write_text("half")
        with pytest.raises(RunError, match="in use by another process"):
            opened(tmp_path)
        assert (tmp_path / ".config.json.4711.partial").exists()


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_closing_does_not_hide_the_first_error(tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"^cannot write .*metrics.jsonl: No space left"), opened(tmp_path) as run:
        monkeypatch.setattr(metrics.EventsWriter, "flush", full)
        monkeypatch.setattr(metrics.EventsWriter, "close", full)
        run.log({"meta_step": 1, "loss": 0.5})
    opened_again = tmp_path / "again"
    with pytest.raises(RunError, match=r"^cannot close the run in .*: No space left"), opened(opened_again):
        pass
    monkeypatch.undo()
    opened(opened_again).close()  # the lock has been let go of


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_ends_in_one_line(run, tmp_path):
    (run / "COMPLETE").unlink(missing_ok=True)
    with pytest.raises(RunError, match=r"^cannot write .*metrics.jsonl: No space left"):
        settings = json.loads((run / "config.json").read_text())["settings"]
        with opened(run, **settings) as here:
            here._metrics._lines.close()
            here._metrics._lines = open("/dev/full", "w")  # noqa: SIM115
            here.log({"meta_step": 5, "loss": 0.5})


def test_a_checkpoint_that_fails_in_a_thread_of_orbax_ends_in_one_line(tmp_path, capsys, caplog):
    """The number of files or their size may be bounded, which is not known before."""
    state = {"phi": np.arange(1000.0)}
    with opened(tmp_path / "run") as here:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            with pytest.raises(RunError, match=r"cannot save the checkpoint of meta-step 1 .*File too large") as error:
                here.save(1, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert len(str(error.value)) < 1000 and capsys.readouterr().err == "" and not caplog.records
        here.save(2, state)
    with opened(tmp_path / "run") as again:
        assert again.latest == 2


def test_a_checkpoint_for_which_the_disk_is_too_full_is_not_begun(run, monkeypatch, capfd):
    """Begun, it would be orbax that says so, in several threads and a hundred lines."""
    settings = json.loads((run / "config.json").read_text())["settings"]
    message = r"^cannot save the checkpoint of meta-step 6 .*: No space left on device; earlier checkpoints are intact"
    with pytest.raises(RunError, match=message), opened(run, **settings) as here:
        monkeypatch.setattr(os, "posix_fallocate", full)
        monkeypatch.setattr(here._checkpoints, "save", None)
        here.save(6, runs.saved_state(6))
    monkeypatch.undo()
    assert runs.read(run)[1] == 4 and not capfd.readouterr().err


def test_an_ascii_terminal_gets_one_line():
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "meta_train.py", "--task", "digits_mlp", "--out", "never", "--seed", "x\x1b[31mé\n"]
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and ended.stderr.isascii() and ended.stderr[:-1].isprintable()
    assert ended.stderr.startswith("Error parsing --seed: invalid literal for int()") and "---" not in ended.stderr


@pytest.mark.parametrize("name", ["run\x00", b"run\xff", "run\x1b[31m", "r" * 3000, "r" * 300])
def test_an_impossible_directory_is_refused_at_the_start(tmp_path, name):
    out = str(tmp_path / os.fsdecode(name))
    for cli, args in ((meta_train.cli, runs.ARGUMENTS), (evaluation.cli, runs.ARGUMENTS[:2])):
        with pytest.raises(Refusal, match=r"[Cc]onfig\.out must|File name too long") as error:
            command(cli, [*args, "--out", out])
        assert str(error.value).isprintable()
    assert not any(tmp_path.iterdir())
