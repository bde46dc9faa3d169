"""The benchmark of the Fisher estimators: both forms are of the same thing, and its table."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.fisher import FORMS, Config, main
from gmn_lopt.util.errors import UsageError


@pytest.mark.parametrize("name", FORMS)
def test_both_forms_agree(name):
    keys = jax.random.split(jax.random.key(0), 2)
    params = [{"w": jax.random.normal(keys[0], (5, 7)), "b": jnp.zeros(7)}, {"w": jnp.ones((7, 3)), "b": jnp.ones(3)}]
    batch = jax.random.normal(keys[1], (6, 5)), jnp.arange(6) % 3
    naive, own = (jax.tree.leaves(jax.jit(form)(params, *batch)) for form in FORMS[name])
    for a, b in zip(naive, own, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_table_and_figures(tmp_path, capsys):
    figures = main(Config(examples=128, widths=(64, 256, 10), repeats=1, out=tmp_path))
    printed = capsys.readouterr().out
    assert [f["name"] for f in figures] == list(FORMS) and all(f"| {name} |" in printed for name in FORMS)
    assert json.loads((tmp_path / "fisher.json").read_text()) == figures
    assert all(f["naive_bytes"] > 2 * f["bytes"] > 0 and f["seconds"] > 0 for f in figures)


def test_impossible_sizes_are_refused():
    with pytest.raises(UsageError, match="must be at least 1"):
        main(Config(examples=0))
