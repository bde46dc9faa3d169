import sys

import pytest

from gmn_lopt.util import progress
from gmn_lopt.util.hardware import usable_cores
from gmn_lopt.util.progress import Progress


def test_a_file_gets_now_and_then_a_line(capsys, monkeypatch):
    now = iter([0.0, *range(1, 100)])
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with Progress(40, 3) as shown:
        shown.describe("1-pes")
        for _ in range(37):
            shown.update()
        shown.note("meta-loss 1.5")
    assert capsys.readouterr().err.splitlines() == [
        *("1-pes: 13/40", "1-pes: 23/40", "1-pes: 33/40"),
        "1-pes: 40/40, meta-loss 1.5",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_shown_if_not_asked_for(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with Progress(2, show=False) as shown:
        shown.update(2)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(2) as shown:
        shown.describe("1-pes")
        shown.note("meta-loss 1.5")
        shown.update(2)
    assert "1-pes: 100%" in capsys.readouterr().err


def test_cores_are_counted_where_there_is_no_affinity(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert usable_cores() == 7
