"""Killed and resumed runs end as one that was not: each way of ending one, at least once."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_runs_end_as_one_that_was_not(tmp_path):
    # In a process of its own, that has not used JAX: runs are copies of it.
    command = [sys.executable, "-m", "fuzz.kills", "--count", "4", "--out", str(tmp_path / "kills")]
    paths = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    again = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    table = [line.strip("|").split("|") for line in again.stdout.splitlines()]
    assert [name.strip() for name in table[0]] == ["ended by", "runs", "kills", "ends as one that was not"]
    assert again.returncode == 0 and int(table[-1][2]) >= 4 and table[-1][1] == table[-1][3]
