import re
from pathlib import Path

import jax.numpy as jnp

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["value"] < names["loss_fn"]({"w1": jnp.zeros((8, 16)), "w2": jnp.zeros((16, 1))}, names["x"])
