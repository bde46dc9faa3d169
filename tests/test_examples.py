"""Every example trains its model, to the accuracy that is stated."""

import importlib
import re
from pathlib import Path

import pytest

from tools.examples import EXAMPLES as IN_THE_TABLE

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("[a-z]*_digits.py"))
FILES = sorted(path.stem for path in EXAMPLES.glob("[a-z]*.py"))
ROW = re.compile(r"^\| `(\w+)\.py` \|.*\| ([\d.]+) % \| [\d.]+ % \| \d+ \|$", re.MULTILINE)
STATED = {name: float(mean) for name, mean in ROW.findall((ROOT / "docs" / "examples.md").read_text())}
MARGIN = 2.0  # of a hundred images; one seed of the three was 1.3 below their mean, all others less


@pytest.mark.parametrize("name", NAMES)
def test_example(name, capsys):
    if name.startswith("equinox"):
        pytest.importorskip("equinox")
    accuracy = importlib.import_module(f"examples.{name}").main()
    assert 100 * accuracy > STATED[name] - MARGIN
    printed = capsys.readouterr().out
    assert "after 200 steps" in printed and f"{accuracy:.1%}" in printed


@pytest.mark.parametrize("name", NAMES)
def test_an_example_says_what_the_table_says(name):
    text = " ".join((EXAMPLES / f"{name}.py").read_text().split('"""')[1].split())
    assert f"{STATED[name]} % of held-out images right" in text


def test_there_is_one_for_each_library():
    libraries = ["cnn", "equinox", "haiku", "linen", "nnx", "optax", "shard_map"]
    assert [f"{name}_digits" for name in libraries] == NAMES
    assert sorted(IN_THE_TABLE) == libraries and sorted(STATED) == NAMES
    assert sorted([*NAMES, "edit_inr", "learned_optimization_tasks"]) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_file_can_be_copied(name):
    assert not re.search(r"\b(from|import) examples\b|sys\.path", (EXAMPLES / f"{name}.py").read_text())


def test_without_learned_optimization_its_example_says_so(monkeypatch, capsys):
    example = importlib.import_module("examples.learned_optimization_tasks")
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    assert example.main() is None
    assert capsys.readouterr().out.strip() == example.MISSING
