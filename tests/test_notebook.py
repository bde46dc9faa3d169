"""The notebook: it has no outputs, and its code runs from top to bottom."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "examples" / "gmn_lopt.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in CODE:
        assert cell["outputs"] == [] and cell["execution_count"] is None
    assert all(len(line.rstrip("\n")) <= 120 for cell in NOTEBOOK["cells"] for line in cell["source"])


def test_its_code_runs(tmp_path):
    """In a process of its own: convolutions of several models at once are slow as other tests compile them."""
    install, *cells = ["".join(cell["source"]) for cell in CODE]
    assert "%pip install" in install and not any("%" in line[:1] for cell in cells for line in cell.splitlines())
    code = "\n\n".join(cells)
    for long, short in (("STEPS = 300", "STEPS = 20"), ("seeds=3", "seeds=1")):
        assert code.count(long) == 1
        code = code.replace(long, short)
    (tmp_path / "notebook.py").write_text(code + '\nfound.figure.savefig("curves.png")\nfigure.savefig("both.png")\n')
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"MPLBACKEND": "Agg"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "notebook.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.count("<- best") == 1
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == ["optimizer", "adamw", "default", "AdamW, as above"]
    assert (tmp_path / "curves.png").stat().st_size and (tmp_path / "both.png").stat().st_size
