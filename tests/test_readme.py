import re
from pathlib import Path

import jax
import jax.numpy as jnp

import gmn_lopt

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs(tmp_path, monkeypatch):
    """The README's Python, with an untrained optimizer where `make demo` leaves a trained one."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    structure = gmn_lopt.analyze(lambda p, x: jnp.mean(jnp.tanh(x @ p)), jnp.ones((3, 2)), jnp.ones((4, 3)))
    lopt = gmn_lopt.LearnedOptimizer(structure)
    gmn_lopt.save(tmp_path / "runs/demo/optimizer", lopt, lopt.init(jax.random.key(0)))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["value"] < names["loss_fn"]({"w1": jnp.zeros((8, 16)), "w2": jnp.zeros((16, 1))}, names["x"])
