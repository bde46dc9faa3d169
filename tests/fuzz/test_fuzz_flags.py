"""Senseless flags are refused in one line, before anything is computed."""

import random

from . import flags


def test_senseless_flags_are_refused(tmp_path):
    flags.called("train", [], False, tmp_path / "warm")
    flags.called("eval", ["--optimizer", "default"], False, tmp_path / "warm")
    wrong = []
    for name, given, must_be_refused in flags.some(random.Random(0), 150):
        found = flags.called(name, given, must_be_refused, tmp_path / "here")
        if not found.fine:
            wrong.append(f"{name} {ascii(given)[:200]}: {found.kind}: {found.details}")
    assert not wrong, f"{len(wrong)} faults:\n" + "\n".join(wrong)
