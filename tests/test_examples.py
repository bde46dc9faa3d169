"""Every example trains its model, run by its file or by its name."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_example(name, capsys):
    if name.startswith("equinox"):
        pytest.importorskip("equinox")
    final = importlib.import_module(f"examples.{name}").main(steps=40)
    assert final < 1.0  # guessing one of ten classes: 2.3
    printed = capsys.readouterr().out
    assert "after 40 steps" in printed and f"{final:.3f}" in printed


def test_there_is_one_for_each_library():
    assert NAMES == ["equinox_digits", "linen_digits", "nnx_digits", "optax_digits"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_needs_nothing_beside_it(name, monkeypatch):
    if name.startswith("equinox"):
        pytest.importorskip("equinox")
    root = str(EXAMPLES.parent)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *(path for path in sys.path if path not in ("", ".", root))])
    runpy.run_path(str(EXAMPLES / f"{name}.py"))  # its imports; training is tested above
