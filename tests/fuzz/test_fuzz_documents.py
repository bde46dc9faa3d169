"""Damaged cards are refused in one line; damaged results, too, or computed anew."""

import random

import pytest

from . import documents
from .outcomes import faults


@pytest.mark.parametrize("what", ["card", "results"])
def test_damaged_documents_are_refused(tmp_path, what):
    pristine = tmp_path / "pristine"
    documents.make(pristine)
    cases = getattr(documents, f"{what}_cases")(pristine, random.Random(0), 40)
    read = getattr(documents, f"read_{what}")
    wrong = faults(cases, pristine, tmp_path, read, documents.REFUSALS, read(pristine))
    assert not wrong, wrong
