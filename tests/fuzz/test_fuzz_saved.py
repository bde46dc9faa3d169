"""Saved optimizers, editors and predictors that are damaged are refused in one line."""

import random
from functools import partial

import pytest

from . import saved
from .outcomes import faults


@pytest.mark.parametrize("name", saved.KINDS)
@pytest.mark.parametrize("signed", [False, True], ids=["damaged", "signed"])
def test_what_is_damaged_is_refused(tmp_path, name, signed):
    pristine = tmp_path / "pristine"
    saved.make(pristine, name)
    read = partial(saved.read_signed if signed else saved.read, name=name)
    expected = None if signed else read(pristine)
    cases = (saved.signed_cases if signed else saved.cases)(pristine, random.Random(name), 25)
    wrong = faults(cases, pristine, tmp_path, read, saved.REFUSALS, expected)
    assert not wrong, wrong
