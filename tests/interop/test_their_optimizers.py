"""Optimizers of learned_optimization as optax transformations: against optax's own, and closed forms."""

import re
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gmn_lopt import interop
from gmn_lopt.evaluation.sources import find_candidates
from gmn_lopt.evaluation.training import training_curves
from gmn_lopt.interop.learned_optimization import to_optax, to_task
from gmn_lopt.util.errors import UsageError
from interop import stubs  # tests/interop


def named(name):
    return f"learned_optimization:interop.stubs:{name}"


@pytest.mark.parametrize(("theirs", "own"), [(stubs.SGD, optax.sgd), (stubs.Adam, optax.adam)])
def test_updates_are_those_of_optax(theirs, own):
    task = to_task(stubs.MLP(), batches=10)
    one, other = to_optax(theirs(0.05)), own(0.05)
    runs = []
    for tx in (one, other):
        params = task.init(jax.random.key(0))
        state = tx.init(params)
        for i in range(5):
            grads = jax.grad(task.loss)(params, task.sample(jax.random.key(i), task.data["train"]))
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        runs.append(jax.tree.leaves(params))
    for a, b in zip(*runs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_parameters_may_change_in_between():
    tx = to_optax(stubs.SGD(0.5))
    state = tx.init(jnp.ones(2))
    assert not any(leaf.shape == (2,) for leaf in jax.tree.leaves(jax.tree.map(jnp.asarray, state[0])))  # no copy
    updates, state = tx.update(jnp.ones(2), state, jnp.full(2, 7.0))
    np.testing.assert_array_equal(updates, [-0.5, -0.5])
    chained = optax.chain(optax.clip(0.1), tx)
    updates, _ = chained.update(jnp.ones(2), chained.init(jnp.ones(2)), jnp.ones(2))
    np.testing.assert_allclose(updates, [-0.05, -0.05], rtol=1e-6)
    with pytest.raises(ValueError, match="call update"):
        tx.update(jnp.ones(2), state)
    with pytest.raises(ValueError, match="Stubborn has no way to set the parameters"):
        to_optax(stubs.Stubborn()).init(jnp.ones(2))


def test_the_evaluation_is_that_of_optax():
    task = to_task(stubs.MLP(), horizon=20, batches=10)
    specs = [f"{named('Adam')}:learning_rate=0.02", "optax:adam:learning_rate=0.02", f"mine={named('SGD')}"]
    candidates = find_candidates(specs, task)
    assert [c.name for c in candidates] == ["Adam(learning_rate=0.02)", "adam(learning_rate=0.02)", "mine"]
    assert len({c.fingerprint for c in candidates}) == 3
    theirs, own = (training_curves(task, c, [0, 1], 5) for c in candidates[:2])
    np.testing.assert_allclose(theirs.test_loss, own.test_loss, rtol=1e-5)
    np.testing.assert_allclose(theirs.train_loss, own.train_loss, rtol=1e-5)
    assert (own.train_loss[:, -1] < own.train_loss[:, 0]).all()


THETA = {"net": {"rate": np.full((1,), 0.25, np.float32)}, "list": [np.float32(2.0), np.ones(2, np.float32)]}


@pytest.mark.parametrize("inside", [False, True])
def test_a_learned_optimizer_with_weights(tmp_path, inside):
    """Its step size is ``0.25 * 2 * (steps left) / 10``, of as many steps as the task has."""
    file = tmp_path / "theta.state"
    saved = {"params": THETA, "gen_id": "a", "step": 7} if inside else THETA
    file.write_bytes(flax.serialization.to_bytes(saved))
    task = to_task(stubs.Quadratic(), horizon=8)
    (candidate,) = find_candidates([f"{named('Scaled')}:weights={str(file)!r}"], task)
    assert candidate.digest
    curves = training_curves(task, candidate, [0], 1)
    rates = 0.25 * 2 * np.arange(8, 0, -1) / 10
    shrinks = np.cumprod((1 - 2 * rates) ** 2)  # of x^2
    start = float(jnp.sum(task.init(jax.random.split(jax.random.key(0))[0]) ** 2))
    np.testing.assert_allclose(curves.test_loss[0], start * shrinks, rtol=1e-4, atol=1e-7)


def changed(**parts):
    return flax.serialization.to_bytes({**THETA, **parts})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "theta.state"),
        (b"no msgpack at all", "is damaged or not flax's msgpack"),
        (flax.serialization.to_bytes(THETA)[:-3], "is damaged or not flax's msgpack"),
        (flax.serialization.to_bytes({"net": THETA["net"]}), "lacks list/0, which the optimizer has"),
        (flax.serialization.to_bytes(7), "lacks list/0"),
        (changed(net={"rate": np.ones((2,), np.float32)}), "has net/rate as float32[2], not float32[1]"),
        (changed(net={"rate": "fast"}), "has net/rate as"),
        (changed(net={"rate": np.full((1,), np.nan, np.float32)}), "not finite"),
    ],
)
def test_bad_weights_end_in_one_line(tmp_path, content, says):
    file = tmp_path / "theta.state"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError) as error:
        find_candidates([f"{named('Scaled')}:weights={str(file)!r}"], to_task(stubs.Quadratic()))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (named("Scaled"), "name the file of its meta-parameters, weights='FILE'"),
        (f"{named('SGD')}:weights='x'", "SGD is made by hand: it has no weights"),
        (f"{named('SGD')}:rate=1", "SGD cannot be made: TypeError"),
        (f"{named('SGD')}:learning_rate='fast'", "cannot"),
        (named("Quadratic"), "neither an Optimizer (init, update, get_params) nor a LearnedOptimizer"),
        (named("Adma"), "has no Adma; did you mean Adam"),
        (named("Stubborn"), "cannot train Quadratic: Stubborn has no way to set the parameters"),
        ("learned_optimization:nowhere:SGD", "No module named 'nowhere'"),
        ("learned_optimization:SGD", "write learned_optimization:MODULE:NAME"),
    ],
)
def test_bad_optimizers_end_in_one_line(spec, says):
    with pytest.raises(UsageError) as error:
        find_candidates([spec], to_task(stubs.Quadratic()))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_library_names_the_package_in_no_import():
    folder = Path(interop.__file__).parent
    names = {
        name
        for file in folder.rglob("*.py")
        for name in re.findall(r"^ *(?:from|import) (\S+)", file.read_text(), re.M)
    }
    assert len(names) > 10 and not [name for name in names if name.split(".")[0] == "learned_optimization"]
