"""Data parallel on eight devices, in processes of their own (eight_devices.py), against one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gmn_lopt
from gmn_lopt import Factors

HERE = Path(__file__).parent
# Replicas that got other factors than each other, or than one device, would be 0.1 apart or more by then.
TOLERANCE = 1e-5


def eight_devices(what):
    flags = os.environ["XLA_FLAGS"].replace("device_count=1", "device_count=8")
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "eight_devices.py"), what]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_training_on_eight_devices_is_training_on_one():
    runs = eight_devices("training")
    assert len(runs) == 10
    for run in runs:
        assert run["error"] < TOLERANCE, run
        assert run["equal"], f"replicas drift apart: {run}"


def test_factors_of_shards_and_of_the_whole_batch():
    found = eight_devices("gradients")
    assert len(found) == 7
    for name, value in ((name, value) for row in found for name, value in row.items() if name != "name"):
        assert value < TOLERANCE, (name, found)


def test_a_run_restored_by_orbax_goes_on_bit_for_bit_and_on_fewer_devices():
    found = eight_devices("checkpoints")
    assert [row["name"] for row in found] == [
        f"{name}, {devices} devices" for name in ("default", "multi_steps") for devices in (8, 4, 1)
    ]
    for row in found:
        assert row["same"], row
        assert row["equal"] or not row["name"].endswith("8 devices"), row
        assert row["error"] < TOLERANCE, row


def loss(w, x):
    return jnp.mean((x @ w) ** 2)


def test_gathered_factors_are_those_of_the_mean_over_devices():
    """In closed form, on the axis of a vmap: 2 u / S for each element of the batch of S."""
    w, x = jnp.array([[1.0], [-2.0]]), jnp.arange(24.0).reshape(3, 4, 2)

    def gathered(x):
        _, _, factors = gmn_lopt.value_grad_and_factors(loss)(w, x)
        return gmn_lopt.gather_factors(factors, "data")

    factors = jax.vmap(gathered, out_axes=None, axis_name="data")(x)
    np.testing.assert_array_equal(factors.activations[0], x.reshape(12, 2))
    np.testing.assert_allclose(factors.tangents[0], 2 * x.reshape(12, 2) @ w / 12, rtol=1e-6)


def test_several_axes_are_gathered_in_order():
    factors = Factors((jnp.arange(6).reshape(2, 3, 1, 1),), (jnp.ones((2, 3, 1, 2)),))
    inner = jax.vmap(lambda f: gmn_lopt.gather_factors(f, ("a", "b")), out_axes=None, axis_name="b")
    gathered = jax.vmap(inner, out_axes=None, axis_name="a")(factors)
    np.testing.assert_array_equal(gathered.activations[0][:, 0], jnp.arange(6))
    np.testing.assert_allclose(gathered.tangents[0], jnp.full((6, 2), 1 / 6))


def test_uses_of_a_kernel_without_its_bias_stay_apart():
    """As where a derivative is in the loss: rows that the bias is not added to are known by their place in the set."""

    def slopes(params, x):
        model = lambda x: jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]  # noqa: E731
        value, slope = jax.jvp(model, (x,), (jnp.ones_like(x),))
        return jnp.mean((value - 1) ** 2) + jnp.mean(slope**2)

    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"w": (3, 8), "b": (8,), "v": (8, 2)}
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}
    x = 3 * jax.random.normal(keys[3], (4, 8, 3))
    whole = x.reshape(32, 3)
    structure = gmn_lopt.analyze(slopes, params, whole)
    assert any(layer.unbiased for layer in structure.layers)
    _, grads, factors = gmn_lopt.value_grad_and_factors(slopes)(params, whole)
    gather = lambda x: gmn_lopt.gather_factors(gmn_lopt.value_grad_and_factors(slopes)(params, x)[2], "data")  # noqa: E731
    gathered = jax.vmap(gather, out_axes=None, axis_name="data")(x)
    tx = gmn_lopt.load("default", structure, learning_rate=0.03)
    one, other = (tx.update(grads, tx.init(params), params, factors=each)[0] for each in (factors, gathered))
    for name in params:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-5)
    for a, b in zip(jax.tree.leaves(factors), jax.tree.leaves(gathered), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_axis_that_there_is_not():
    with pytest.raises(NameError, match="nowhere"):
        gmn_lopt.gather_factors(Factors((jnp.ones((2, 1)),), ()), "nowhere")


def test_sets_that_do_not_come_from_the_batch():
    def positions(params, x):
        h = params["tokens"][x] + params["positions"][jnp.arange(x.shape[1])]
        return jnp.mean((h @ params["out"]) ** 2)

    params = {"tokens": jnp.ones((5, 3)), "positions": jnp.ones((4, 3)), "out": jnp.ones((3, 2))}
    _, _, factors = gmn_lopt.value_grad_and_factors(positions)(params, jnp.zeros((2, 4), int))
    sets = [leaf.shape[0] for leaf in jax.tree.leaves(factors)]
    assert [sets[i] for i in factors.without_batch] == [4, 4]
    assert all(size == 8 for i, size in enumerate(sets) if i not in factors.without_batch)


def test_what_depends_on_the_device_comes_from_the_batch():
    def own_positions(w, x):
        return jnp.mean((w[jax.lax.axis_index("data") + jnp.arange(2)] + x) ** 2)

    def without(x):
        return gmn_lopt.value_grad_and_factors(own_positions)(jnp.ones((5, 3)), x)[2].without_batch

    static = []
    jax.vmap(lambda x: static.append(without(x)) or x, axis_name="data")(jnp.ones((2, 2, 3)))
    assert static == [()]
