"""Saved optimizers that are damaged are refused in one line."""

import random

import pytest

from . import saved
from .outcomes import faults


@pytest.mark.parametrize("name", saved.OPTIMIZERS)
@pytest.mark.parametrize("signed", [False, True], ids=["damaged", "signed"])
def test_damaged_optimizers_are_refused(tmp_path, name, signed):
    pristine = tmp_path / "pristine"
    saved.make(pristine, name)
    read, expected = (saved.read_signed, None) if signed else (saved.read, saved.read(pristine))
    cases = (saved.signed_cases if signed else saved.cases)(pristine, random.Random(name), 25)
    wrong = faults(cases, pristine, tmp_path, read, saved.REFUSALS, expected)
    assert not wrong, wrong
