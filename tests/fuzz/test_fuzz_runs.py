"""Damaged run directories are refused in one line under ``--resume``, or make no difference."""

import random

import pytest

from . import runs
from .outcomes import faults


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "pristine"
    runs.make(path)
    assert runs.read(path)[1:] == [4, runs.digest(runs.saved_state(4)), [1, 2, 3, 4]]
    return path


@pytest.mark.parametrize("cases", [runs.cases, runs.unsigned_cases, runs.metrics_cases], ids=lambda f: f.__name__)
def test_damaged_runs_are_refused(pristine, tmp_path, cases):
    expected = None if cases is runs.unsigned_cases else runs.read_sound(pristine)
    read = runs.read_any if cases is runs.unsigned_cases else runs.read_sound
    wrong = faults(cases(pristine, random.Random(0), 15), pristine, tmp_path, read, runs.REFUSALS, expected)
    assert not wrong, wrong
