"""The benchmark of updates: its table and figures, and the sizes of its models."""

import json
import math

import jax
import pytest

from bench.update import MODELS, Config, main
from gmn_lopt.util.errors import UsageError

NUMBERS = {"10k": 1e4, "100k": 1e5, "1m": 1e6, "4m": 4.2e6, "10m": 1e7, "30m": 3e7, "100m": 1e8, "gpt2": 1.244e8}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_about_as_many_parameters_as_they_say(name):
    shapes = jax.eval_shape(MODELS[name].init, jax.random.key(0))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert count == pytest.approx(NUMBERS[name.rpartition("_")[2]], rel=0.5 if name != "gpt2" else 0.001)


def test_table_and_figures(tmp_path):
    lines = []
    config = Config(models=("mlp_10k",), tokens=(64,), optimizers=("adamw", "default"), steps=3, out=tmp_path)
    figures = main(config, lines.append)
    assert json.loads((tmp_path / "update.json").read_text()) == figures
    assert [f["optimizer"] for f in figures] == ["adamw", "default"] and figures[0]["ratio"] == 1
    assert all(f"| {f['optimizer']} |" in line for f, line in zip(figures, lines[-2:]))
    for f in figures:
        assert len(f["step_s"]) == 3 and f["slowest_s"] == max(f["step_s"]) >= f["median_s"] > 0
        assert f["parameters"] == 64 * 128 + 128 + 1290 and f["state_bytes"] >= 8 * f["parameters"]
        assert f["peak_bytes"] > f["state_bytes"] + f["temporary_bytes"]


def test_impossible_sizes_are_refused():
    with pytest.raises(UsageError, match="must be at least 1"):
        main(Config(steps=0))
    with pytest.raises(UsageError, match="multiples of 1024"):
        main(Config(models=("gpt2",), tokens=(1000,)))
