"""Saved optimizers that are damaged are refused in one line."""

import random

import pytest

from . import saved
from .outcomes import damaged


@pytest.mark.parametrize("name", saved.OPTIMIZERS)
def test_damaged_optimizers_are_refused(tmp_path, name):
    pristine = tmp_path / "pristine"
    saved.make(pristine, name)
    expected = saved.read(pristine)
    faults = []
    for case in saved.cases(pristine, random.Random(name), 40):
        for read, loaded in ((saved.read, expected), (saved.read_signed, None)):
            found = damaged(case, pristine, tmp_path, read, saved.REFUSALS, loaded)
            if not found.fine:
                faults.append(f"{case.name} ({read.__name__}): {found.kind}: {found.details}")
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults)
