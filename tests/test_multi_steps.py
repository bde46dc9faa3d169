"""Gradient accumulation: micro-batches make the step of the batch that consists of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizing import mlp, relative_difference

import gmn_lopt

LOSS, PARAMS, BATCH = mlp(6, 10, 10, 3, batch=64)
STRUCTURE = gmn_lopt.analyze(LOSS, PARAMS, *BATCH)


def train(tx, parts, loss=LOSS, params=PARAMS, batch=BATCH, steps=3):
    """Parameters and state after some passes over a batch, another order each time, cut into parts."""
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *batch)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        order = jax.random.permutation(jax.random.key(i), len(batch[0]))
        for part in jnp.split(order, parts):
            params, state = step(params, state, tuple(a[part] for a in batch))
    return params, state


@pytest.mark.parametrize("name", ["default", "default+gmn"])
def test_micro_batches_make_the_steps_of_their_union(name):
    tx = gmn_lopt.load(name, STRUCTURE)
    whole, _ = train(tx, 1)
    accumulated, state = train(gmn_lopt.multi_steps(tx, 4, STRUCTURE), 4)
    assert relative_difference(accumulated, whole) < 1e-3
    assert relative_difference(PARAMS, whole) > 0.1
    assert (int(state.mini_step), int(state.gradient_step), int(state.inner_opt_state.step)) == (0, 3, 3)


def test_the_factors_of_the_last_micro_batch_alone_make_other_steps():
    """What optax.MultiSteps does; without that this file would test nothing."""
    tx = gmn_lopt.load("default", STRUCTURE)
    assert relative_difference(train(optax.MultiSteps(tx, 4), 4)[0], train(tx, 1)[0]) > 0.1


def tokens_loss(params, ids, y):
    """Token ids are integers; the set of the positions does not come from the batch."""
    h = params["tokens"][ids] + params["positions"][jnp.arange(ids.shape[1])]
    return jnp.mean((jnp.tanh(h @ params["up"] + params["bias"]).mean(1) @ params["out"] - y) ** 2)


def test_the_factors_that_arrive_are_those_of_the_batch():
    rng = np.random.default_rng(0)
    shapes = {"tokens": (7, 4), "positions": (3, 4), "up": (4, 5), "bias": (5,), "out": (5, 2)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    batch = jnp.asarray(rng.integers(0, 7, (16, 3))), jnp.asarray(rng.normal(size=(16, 2)), jnp.float32)
    shapes_of_batch = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in batch)
    structure = gmn_lopt.analyze(tokens_loss, params, *shapes_of_batch)
    compute = gmn_lopt.value_grad_and_factors(tokens_loss)
    _, grads, factors = compute(params, *batch)
    assert factors.without_batch
    # A transformation that keeps what it is given.
    keep = optax.GradientTransformationExtraArgs(
        lambda _: jax.tree.map(jnp.zeros_like, (grads, factors)), lambda g, state, params, factors: (g, (g, factors))
    )
    tx = gmn_lopt.multi_steps(keep, 4, structure)
    state = tx.init(params)
    for _ in range(2):  # nothing of the first step is left in the second
        for part in range(4):
            _, g, f = compute(params, *(x[4 * part : 4 * part + 4] for x in batch))
            updates, state = tx.update(g, state, params, factors=f)
            assert part == 3 or not any(jnp.any(u) for u in jax.tree.leaves(updates))
        kept_grads, kept = state.inner_opt_state
        for a, b in zip(jax.tree.leaves((kept_grads, kept)), jax.tree.leaves((grads, factors)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert relative_difference(structure.reconstruct(kept), grads) < 1e-5


def slopes_loss(params, x):
    """The derivative in the input goes through the kernels a second time, without biases."""
    model = lambda x: jnp.tanh(jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] + params["c"]) @ params["out"]  # noqa: E731
    value, slope = jax.jvp(model, (x,), (jnp.ones_like(x),))
    return jnp.mean((value - 1) ** 2) + jnp.mean(slope**2)


def test_uses_without_the_bias_stay_apart():
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = {"w": (3, 8), "b": (8,), "v": (8, 8), "c": (8,), "out": (8, 2)}
    params = {name: jax.random.normal(key, shape) / 2 for key, (name, shape) in zip(keys, shapes.items())}
    batch = (3 * jax.random.normal(keys[5], (32, 3)),)
    structure = gmn_lopt.analyze(slopes_loss, params, *batch)
    assert any(layer.unbiased for layer in structure.layers)
    tx = gmn_lopt.load("default", structure, learning_rate=0.03)
    whole, _ = train(tx, 1, slopes_loss, params, batch)
    accumulated, _ = train(gmn_lopt.multi_steps(tx, 4, structure), 4, slopes_loss, params, batch)
    assert relative_difference(accumulated, whole) < 1e-3


def images_loss(params, x, y):
    """Images that are read are larger than those that are written."""
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "window_strides": (2, 2), "padding": "SAME"}
    h = jax.nn.relu(jax.lax.conv_general_dilated(x, params["filters"], **layout) + params["bias"])
    return jnp.mean((h.mean((1, 2)) @ params["out"] - y) ** 2)


def test_convolutions():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"filters": (3, 3, 2, 6), "bias": (6,), "out": (6, 2)}
    params = {name: jax.random.normal(key, shape) / 2 for key, (name, shape) in zip(keys, shapes.items())}
    batch = jax.random.normal(keys[3], (16, 6, 6, 2)), jax.random.normal(keys[4], (16, 2))
    structure = gmn_lopt.analyze(images_loss, params, *batch)
    assert len({size for size, _ in (*structure.activation_shapes, *structure.tangent_shapes)}) == 3
    tx = gmn_lopt.load("default", structure, learning_rate=0.03)
    whole, _ = train(tx, 1, images_loss, params, batch)
    accumulated, _ = train(gmn_lopt.multi_steps(tx, 4, structure), 4, images_loss, params, batch)
    assert relative_difference(accumulated, whole) < 1e-5


def test_in_a_chain_masked_and_under_scan():
    """With clipping inside; around some of the parameters; and the loop over micro-batches compiled as one."""
    mask = [{"b": False, "w": True}] * 3
    inner = optax.chain(optax.clip_by_global_norm(0.1), gmn_lopt.load("default", STRUCTURE))
    tx = optax.chain(optax.masked(gmn_lopt.multi_steps(inner, 2, STRUCTURE), mask), optax.scale(0.5))
    micro = tuple(x.reshape(2, 32, *x.shape[1:]) for x in BATCH)

    def step(carry, batch):
        params, state = carry
        _, grads, factors = gmn_lopt.value_grad_and_factors(LOSS)(params, *batch)
        updates, state = tx.update(grads, state, params, factors=factors, value=jnp.ones(()), other="x")
        updates = jax.tree.map(lambda u, m: u if m else 0.0 * u, updates, mask)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, micro))((PARAMS, tx.init(PARAMS)))
    whole = optax.masked(inner, mask)
    _, grads, factors = gmn_lopt.value_grad_and_factors(LOSS)(PARAMS, *BATCH)
    updates, _ = whole.update(grads, whole.init(PARAMS), PARAMS, factors=factors)
    expected = jax.tree.map(lambda p, u, m: p + 0.5 * u if m else p, PARAMS, updates, mask)
    assert relative_difference(params, expected) < 1e-3
    assert relative_difference(PARAMS, expected) > 1e-2


def test_what_it_refuses():
    tx = gmn_lopt.multi_steps(gmn_lopt.load("default", STRUCTURE), 4, STRUCTURE)
    state = tx.init(PARAMS)
    _, grads, factors = gmn_lopt.value_grad_and_factors(LOSS)(PARAMS, *(x[:8] for x in BATCH))
    with pytest.raises(gmn_lopt.StructureError, match="sets of 8 elements, but 4 of them shall make 64: analyse"):
        tx.update(grads, state, PARAMS, factors=factors)
    with pytest.raises(ValueError, match="multi_steps keeps the factors"):
        tx.update(grads, state, PARAMS)
    with pytest.raises(gmn_lopt.StructureError, match="must be gmn_lopt's Factors, not tuple"):
        tx.update(grads, state, PARAMS, factors=())
    for wrong in (0, -1, True):
        with pytest.raises(ValueError, match="every_k must be a whole number of at least 1"):
            gmn_lopt.multi_steps(optax.sgd(0.1), wrong, STRUCTURE)
