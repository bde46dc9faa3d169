import sys
from pathlib import Path

import pytest

import meta_train

sys.path.append(str(Path(meta_train.__file__).parent / "bench"))

from directions import Config, UsageError, main


def test_table():
    specs = ("muon:0.05", "muon:0.05:10:1", "adam:0.005")
    text = main(Config("digits_mlp", specs, adam=(0.0001, 0.005), seeds=2, horizon=40))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert [row[0] for row in rows[2:]] == ["Adam, 0.005", *specs]
    assert rows[2][1] == "1.00 ± 0.00" and rows[2][2] == "0 of 2"
    assert rows[5][3:] == rows[2][3:]  # the same Adam, as a direction
    assert float(rows[3][1].split()[0]) > 1 and rows[4][1:3] == ["—", "2 of 2"]  # ever smaller steps do not get there


@pytest.mark.parametrize("wrong", ["muon", "muon:0.1:3", "muon:-1", "lion:0.1", "muon:a"])
def test_what_is_not_understood_is_refused_in_one_line(wrong):
    with pytest.raises(UsageError, match=f"--directions: direction '{wrong}': [^\\n]+$"):
        main(Config("digits_mlp", (wrong,), horizon=10))
    with pytest.raises(UsageError, match="--task nothing: unknown task"):
        main(Config("nothing", ("muon:1",)))
