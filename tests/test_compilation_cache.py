"""Compiled programs that the commands keep."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gmn_lopt.util.compilation_cache import _remove_oldest

ROOT = Path(__file__).parent.parent
COMMAND = ["meta_train.py", "--task", "linear_regression", "--optimizer", "sgdm"]
COMMAND += ["--stage", "truncated:meta_steps=1,truncation=2,pairs=2"]


def run(place, name, **environment):
    known = {"JAX_ENABLE_COMPILATION_CACHE": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    known |= {"XDG_CACHE_HOME": str(place / "cache")} | environment
    command = [sys.executable, *COMMAND, "--out", str(place / name)]
    subprocess.run(command, cwd=ROOT, env=os.environ | known, check=True, capture_output=True)
    return (place / name / "optimizer" / "phi.safetensors").read_bytes()


def test_a_second_run_finds_what_the_first_has_compiled(tmp_path):
    first = run(tmp_path, "first")
    (place,) = (tmp_path / "cache" / "gmn_lopt").iterdir()
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    kept = {file: file.stat().st_mtime_ns for file in place.iterdir()}
    assert any("step" in file.name for file in kept)
    assert run(tmp_path, "second") == first
    assert kept == {file: file.stat().st_mtime_ns for file in place.iterdir()}


@pytest.mark.parametrize("choice", ["JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"])
def test_the_user_chooses_the_place_and_one_that_cannot_be_made_stops_nothing(tmp_path, choice):
    (tmp_path / "file").write_text("")
    place = tmp_path / ("chosen" if choice == "JAX_COMPILATION_CACHE_DIR" else "file")
    run(tmp_path, "run", **{choice: str(place)})
    assert not (tmp_path / "cache").exists()
    assert not place.is_dir() or any(place.iterdir())


def test_the_oldest_programs_are_removed_first(tmp_path):
    for age in range(4):
        (tmp_path / str(age)).write_bytes(bytes(10))
        os.utime(tmp_path / str(age), (1000 - age, 1000 - age))
    _remove_oldest(tmp_path, 25)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "1"]
