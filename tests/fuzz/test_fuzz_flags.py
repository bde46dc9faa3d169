"""Senseless flags are refused in one line, before anything is computed."""

import random

import pytest

from . import flags
from .outcomes import REFUSED


def test_senseless_flags_are_refused(tmp_path):
    flags.called("train", [], False, tmp_path / "warm")
    flags.called("eval", ["--optimizer", "default"], False, tmp_path / "warm")
    wrong = []
    for name, given, must_be_refused in flags.some(random.Random(0), 150):
        found = flags.called(name, given, must_be_refused, tmp_path / "here")
        if not found.fine:
            wrong.append(f"{name} {ascii(given)[:200]}: {found.kind}: {found.details}")
    assert not wrong, f"{len(wrong)} faults:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("train", ["--seed", "9" * 20], "Config.seed must be a whole number of at least 0 and at most 4294967295"),
        ("train", ["--horizon", "9" * 20], "Config.horizon must be a whole number of at least 1 and at most 10000000"),
        ("train", ["--horizon", "9999991"], "truncation 5 does not divide the horizon 9999991; choose a divisor"),
        ("train", ["--rate-range", "nan"], "Config.rate_range must be positive, not nan"),
        (
            "train",
            ["--optimizer.residual.output-scale", "nan"],
            "Residual.output_scale must be positive, or 0, not nan",
        ),
        ("train", ["--optimizer.residual.network.width", "9" * 20], "PointwiseMLP.width must be a whole number"),
        ("train", ["--stage", f"pes:pairs={2**63}"], "Stage.pairs must be a whole number of at least 1"),
        ("train", ["--task", "linear_regression:batch_size=1.5"], "batch_size must be a whole number, not 1.5"),
        (
            "train",
            ["--task", "linear_regression:batch_size=" + "9" * 20],
            "batch_size must be a finite number, if whole",
        ),
        ("train", ["-" * 3000], "is not a flag"),
        ("train", ["--data-dir", "x" * 5000], "an argument has 5000 characters, more than 4096"),
        ("eval", ["--seeds", "9" * 20], "--seeds must be at least 1 and at most 10000, not 99999999999999999999"),
        ("eval", ["--first-seed", "9" * 20], "--first-seed must be at least 0 and at most 2147483648"),
        ("eval", ["--optimizer", "optax:adam:learning_rate=-1"], "learning_rate must be a finite number of at least 0"),
        ("eval", ["--optimizer", "optax:adam:learning_rate=1j"], "learning_rate must be a finite number"),
        ("eval", ["--optimizer", "default:learning_rate=-1"], "learning_rate must be a finite number of at least 0"),
        ("eval", ["--optimizer", "a\x1b[31m\nb"], "control characters"),
    ],
    ids=lambda x: str(x)[:20].encode("ascii", "replace").decode() if isinstance(x, str) else "",
)
def test_senseless_values_are_named(tmp_path, name, given, message):
    found = flags.called(name, given, True, tmp_path / "here")
    assert found.kind == REFUSED and message in found.details, found
