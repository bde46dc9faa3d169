"""Ctrl-C and SIGTERM: the first lets a run end well, the second ends it at once, and none shows a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gmn_lopt.meta.processes import stop_signal

ROOT = Path(__file__).parent.parent
BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def usual():
    """What the usual handlers of both signals were called with."""
    called = []
    before = {number: signal.signal(number, lambda number, _: called.append(number)) for number in BOTH}
    yield called
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", BOTH)
@pytest.mark.parametrize("second", BOTH)
def test_the_second_signal_acts_as_usual_whichever_it_is(usual, first, second):
    with stop_signal() as stop:
        assert not stop(1)
        os.kill(os.getpid(), first)
        assert stop(2) and usual == []
        os.kill(os.getpid(), second)
        assert usual == [second]
    os.kill(os.getpid(), first)
    assert usual == [second, first]


BUSY = """
import hashlib, signal, sys
from gmn_lopt.cli.command_line import interrupted_with
from gmn_lopt.meta.processes import stop_signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
with stop_signal() if sys.argv[1] == "stop_signal" else interrupted_with("what to do next"):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in which Python calls no handler, like a compilation
"""


def busy(context):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, context], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("first, second", [BOTH, BOTH[::-1], BOTH[:1] * 2, BOTH[1:] * 2])
def test_the_second_signal_ends_a_process_that_cannot_listen(first, second):
    process = busy("stop_signal")
    process.send_signal(first)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=2)
    process.send_signal(second)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (128 + second, "")


def test_ctrl_c_ends_an_evaluation_that_cannot_listen():
    process = busy("interrupted_with")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "what to do next\n")


TOGETHER = """
import os, signal, time
from gmn_lopt.meta.processes import stop_signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
with stop_signal():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    time.sleep(60)
"""


def test_two_signals_that_arrive_together_end_the_process():
    ended = subprocess.run([sys.executable, "-c", TOGETHER], cwd=ROOT, capture_output=True)
    assert -ended.returncode in BOTH and ended.stderr == b""


INTERRUPTED = """
import os, signal, sys
import gmn_commands

signal.signal(signal.SIGINT, signal.default_int_handler)  # the process that tests may ignore it

class Interrupt:
    def find_spec(self, name, *_):
        if name == loading:
            os.kill(os.getpid(), signal.SIGINT)

loading, command, *sys.argv[1:] = sys.argv[1:]
sys.meta_path.insert(0, Interrupt())
getattr(gmn_commands, command)()
"""


@pytest.mark.parametrize("command", ["meta_train", "evaluate"])
@pytest.mark.parametrize("loading", ["jax", "gmn_lopt.cli.command_line", "gmn_lopt.tasks.digits_mlp"])
def test_ctrl_c_before_anything_has_begun_shows_no_traceback(tmp_path, command, loading):
    arguments = [loading, command, "--task", "digits_mlp", "--out", str(tmp_path / "out"), "--horizon", "7"]
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in ended.stderr and ended.stderr.count("\n") <= 1, ended.stderr
    assert not (tmp_path / "out").exists()
    if loading != "gmn_lopt.tasks.digits_mlp":  # then there is something that may be saved
        assert ended.returncode == -signal.SIGINT and ended.stderr == ""
