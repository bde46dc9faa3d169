"""Training curves: the same problem for every optimizer, and the same numbers as a plain loop."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gmn_lopt.evaluation.paper import adam
from gmn_lopt.evaluation.timing import time_per_step
from gmn_lopt.evaluation.training import Candidate, mean_loss, run_keys, training_curves
from gmn_lopt.meta.task import Task

SEEDS = [0, 5]


def sgd(rate):
    return optax.sgd(rate)


def regression(horizon: int = 12) -> Task:
    """A small nonlinear regression."""
    x = jax.random.normal(jax.random.key(7), (64, 3))
    data = {"x": x, "y": jnp.sin(x.sum(axis=1))}
    splits = {"train": jax.tree.map(lambda a: a[:40], data), "test": jax.tree.map(lambda a: a[40:], data)}

    def init(key):
        return {"w": jax.random.normal(key, (3,)), "b": jnp.zeros(())}

    def loss(params, batch):
        return jnp.mean((jnp.tanh(batch["x"] @ params["w"] + params["b"]) - batch["y"]) ** 2)

    def sample(key, split):
        index = jax.random.randint(key, (8,), 0, 40)
        return jax.tree.map(lambda array: array[index], split)

    return Task("regression", horizon, 8, 2.0, splits, init, loss, sample)


def diary() -> Task:
    """A task whose training loss tells which batch was drawn and whose test loss tells the initialisation."""

    def loss(params, batch):
        return params["start"] if len(batch) == 1 else batch.mean() + 0 * params["start"]

    def init(key):
        return {"start": jax.random.normal(key)}

    data = {"train": jnp.zeros(3), "test": jnp.zeros(1)}
    return Task("diary", 6, 4, 99.0, data, init, loss, lambda key, split: jax.random.normal(key, (4,)))


def plain_loop(task: Task):
    """A function of learning rate and seed: training with Adam, one step after the other."""

    @jax.jit
    def step(params, state, rate, key):
        batch = task.sample(key, task.data["train"])
        value, grads = jax.value_and_grad(task.loss)(params, batch)
        updates, state = optax.adam(rate).update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, value, task.loss(params, task.data["test"])

    def run(rate: float, seed: int) -> tuple[list[float], list[float]]:
        init_key, batch_key = run_keys(seed)
        params = task.init(init_key)
        state = optax.adam(rate).init(params)
        tests, trains = [], []
        for t in range(task.horizon):
            params, state, train, test = step(params, state, rate, jax.random.fold_in(batch_key, t))
            trains.append(float(train))
            tests.append(float(test))
        return tests, trains

    return run


def test_grid_equals_a_plain_loop():
    task, rates = regression(), [0.01, 0.3, 0.1]
    grid = Candidate("adam", "", "", adam, jnp.array(rates))
    done = []
    curves = training_curves(task, grid, SEEDS, 3, grid=True, record_weights=True, progress=done.append)
    assert sum(done) == len(rates) * len(SEEDS) * task.horizon
    assert curves.weights.shape == (3, 2, 5, 4)
    plain = plain_loop(task)
    for h, rate in enumerate(rates):
        for s, seed in enumerate(SEEDS):
            test, train = plain(rate, seed)
            np.testing.assert_allclose(curves.test_loss[h, s], test[2::3], rtol=1e-4)
            np.testing.assert_allclose(curves.train_loss[h, s], np.reshape(train, (4, 3)).mean(axis=1), rtol=1e-4)
    one = training_curves(task, Candidate("adam", "", "", adam, jnp.array(0.3)), SEEDS, 3)
    np.testing.assert_allclose(one.test_loss, curves.test_loss[1], rtol=1e-4)
    assert one.weights.shape == (2, 5, 0)


def test_weights_are_those_of_the_run():
    task = regression()
    curves = training_curves(task, Candidate("sgd", "", "", sgd, 0.1), SEEDS, 3, record_weights=True)
    start = task.init(run_keys(SEEDS[1])[0])
    np.testing.assert_allclose(curves.weights[1, 0], [start["b"], *start["w"]], rtol=1e-6)
    b, *w = curves.weights[1, -1]
    final = task.loss({"w": jnp.array(w), "b": b}, task.data["test"])
    np.testing.assert_allclose(curves.test_loss[1, -1], final, rtol=1e-5)


def test_every_optimizer_sees_the_same_batches_and_initialisations():
    task = diary()
    mine = training_curves(task, Candidate("sgd", "", "", sgd, 0.1), SEEDS, 1)
    grid = training_curves(task, Candidate("adam", "", "", adam, jnp.array([0.1, 0.2])), SEEDS, 1, grid=True)
    alone = training_curves(task, Candidate("adam", "", "", adam, 0.1), SEEDS[1:], 2)
    for other in grid.train_loss:
        np.testing.assert_array_equal(other, mine.train_loss)
    np.testing.assert_allclose(alone.train_loss[0], mine.train_loss[1].reshape(3, 2).mean(axis=1), rtol=1e-6)
    # Every batch and every seed's batches are different, and so are the initialisations.
    assert len(np.unique(mine.train_loss)) == mine.train_loss.size
    for curves in (*grid.test_loss, mine.test_loss):
        np.testing.assert_array_equal(curves, np.repeat([[task.init(run_keys(s)[0])["start"]] for s in SEEDS], 6, 1))
    assert mine.test_loss[0, 0] != mine.test_loss[1, 0]


def test_divergence_is_recorded_and_capped():
    curves = training_curves(regression(), Candidate("sgd", "", "", sgd, jnp.nan), SEEDS, 1)
    assert not np.isfinite(curves.test_loss).any()
    assert (curves.train_loss[:, 1:] == 2.0).all()


def test_evaluations_must_divide_the_horizon():
    with pytest.raises(ValueError, match="must divide the horizon 12"):
        training_curves(regression(), Candidate("sgd", "", "", sgd, 0.1), SEEDS, 5)


def test_extra_arguments_reach_optimizers_that_take_them():
    candidate = Candidate("polyak", "", "", lambda _: optax.polyak_sgd())
    curves = training_curves(regression(), candidate, SEEDS, 12)
    assert np.isfinite(curves.test_loss).all()


def slow(rate):
    """Adam, with a computation on top that takes its time and does not change the result."""

    def update(updates, state, params=None):
        x = jnp.full((150, 150), jax.tree.leaves(updates)[0].sum())
        wait = jax.lax.fori_loop(0, 20, lambda _, m: m @ m * 1e-9, x).sum()
        return jax.tree.map(lambda u: u + 0 * jnp.nan_to_num(wait), updates), state

    return optax.chain(optax.adam(rate), optax.GradientTransformation(lambda params: optax.EmptyState(), update))


@pytest.mark.parametrize("at_once", [None, 1, 3, 7, 10, 11])
def test_loss_on_parts_of_the_split_is_that_on_the_whole(at_once):
    split = {"x": jax.random.normal(jax.random.key(0), (10, 3)), "y": jnp.arange(10.0)}
    loss = lambda w, examples: jnp.mean((examples["x"] @ w - examples["y"]) ** 2)  # noqa: E731
    w = jnp.array([1.0, -2.0, 0.5])
    assert mean_loss(loss, w, split, at_once) == pytest.approx(float(loss(w, split)), rel=1e-6)


def test_loss_on_parts_needs_the_memory_of_one_part():
    split, w = jnp.ones((1000, 4)), jnp.ones((4, 500))
    loss = lambda w, x: jnp.mean(jax.nn.logsumexp(jnp.sort(x @ w), axis=1))  # noqa: E731  (a sort is not fused away)

    def memory(at_once):
        compiled = jax.jit(lambda w, split: mean_loss(loss, w, split, at_once)).lower(w, split).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(50) < memory(None) / 5


def test_timing_tells_slow_from_fast():
    calls = []
    candidates = [Candidate("a", "", "", slow, jnp.array(0.1)), Candidate("b", "", "", adam, jnp.array(0.1))]
    timing = time_per_step(regression(), candidates, rounds=3, seconds=0.01, progress=lambda: calls.append(1))
    times = timing.seconds
    assert times.shape == (2, 3)
    assert not timing.one_core
    assert len(calls) == 6
    assert (times > 0).all()
    assert np.median(times[0]) > 2 * np.median(times[1])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_a_busy_machine_is_noticed_and_slows_all_alike():
    candidates = [Candidate("a", "", "", slow, jnp.array(0.1)), Candidate("b", "", "", adam, jnp.array(0.1))]
    core = sorted(os.sched_getaffinity(0))[os.getpid() % len(os.sched_getaffinity(0))]
    program = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    loops = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    try:
        timing = time_per_step(regression(), candidates, rounds=5, seconds=0.03, on_one_core=True)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert timing.one_core
    assert timing.waiting > 0.4
    assert np.median(timing.seconds[0]) > 1.5 * np.median(timing.seconds[1])
