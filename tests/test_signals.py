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
