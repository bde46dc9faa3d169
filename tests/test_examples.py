"""Every example trains its model."""

import importlib
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("[a-z]*_digits.py"))
FILES = sorted(path.stem for path in EXAMPLES.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_example(name, capsys):
    if name.startswith("equinox"):
        pytest.importorskip("equinox")
    final = importlib.import_module(f"examples.{name}").main(steps=40)
    assert final < 1.0  # guessing one of ten classes: 2.3
    printed = capsys.readouterr().out
    assert "after 40 steps" in printed and f"{final:.3f}" in printed


def test_there_is_one_for_each_library():
    libraries = ["cnn", "equinox", "haiku", "linen", "nnx", "optax", "shard_map"]
    assert [f"{name}_digits" for name in libraries] == NAMES
    assert sorted([*NAMES, "edit_inr", "learned_optimization_tasks"]) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_file_can_be_copied(name):
    assert not re.search(r"\b(from|import) examples\b|sys\.path", (EXAMPLES / f"{name}.py").read_text())


def test_without_learned_optimization_its_example_says_so(monkeypatch, capsys):
    example = importlib.import_module("examples.learned_optimization_tasks")
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    assert example.main() is None
    assert capsys.readouterr().out.strip() == example.MISSING
