"""The step size that adapts itself while training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizing import analyzed, lively, mlp, play, record, relative_difference

import gmn_lopt
from gmn_lopt import LearnedOptimizer
from gmn_lopt.optimizers.step_size import adapt_step_size, init_step_size

MODEL = mlp(5, 6, 3)
STRUCTURE, RECORDED = analyzed(MODEL), record(MODEL, steps=8)
GAIN, OVERSHOOT = 0.7, 0.2
ROOM = jnp.float32(1e-6)  # a power law that leaves feedback room to grow


def with_coefficients(phi, gain=GAIN, overshoot=OVERSHOOT):
    return phi | {"log_gain": jnp.log(gain), "log_overshoot": jnp.log(overshoot)}


def literal_factors(updates):
    """``exp(c)`` of each leaf at each step in float64, for updates that are those of a step size without feedback."""
    leaves = [[np.asarray(x, np.float64) for x in jax.tree.leaves(u)] for u in updates]
    grads = [[np.asarray(x, np.float64) for x in jax.tree.leaves(g)] for _, g, _ in RECORDED]
    factors = []
    for leaf in range(len(leaves[0])):
        c, square, row = 0.0, 0.0, [1.0]
        for t in range(1, len(grads)):
            u, g = leaves[t - 1][leaf] * np.exp(c), grads[t][leaf]
            cosine = -np.sum(u * g) / np.sqrt(np.sum(u**2) * np.sum(g**2))
            square = 0.98 * square + 0.02 * cosine**2
            z = cosine / np.sqrt(square / (1 - 0.98**t))
            c += GAIN * (np.clip(z, -1, 1) + OVERSHOOT)
            row.append(np.exp(c))
        factors.append(row)
    return np.array(factors).T


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": "sgdm", "base": "adam"},
        {"backbone": "ds", "width": 4, "gradmetanet": None},
        {"backbone": "celo", "width": 4, "gradmetanet": None, "rule": "normalized", "base": "denoised"},
    ],
)
def test_steps_are_multiplied_by_what_the_formula_says(options):
    plain, adapting = (LearnedOptimizer(STRUCTURE, adapt=adapt, decay=True, **options) for adapt in (False, True))
    # A power law that falls fast leaves feedback all the room it needs.
    phi = lively(plain) | {"log_tau": jnp.log(0.03), "log_power": jnp.log(2.0)}
    expected = play(plain, phi, RECORDED)
    found = play(adapting, with_coefficients(phi), RECORDED)
    factors = literal_factors(expected)
    assert np.abs(np.log(factors[-1])).max() > 1 and np.ptp(factors[-1]) > 0.01
    for t, (a, b) in enumerate(zip(found, expected)):
        scaled = jax.tree.unflatten(jax.tree.structure(b), [f * x for f, x in zip(factors[t], jax.tree.leaves(b))])
        assert relative_difference(a, scaled) < 1e-4


@pytest.mark.parametrize("alpha", [0.003, 0.01, 0.3])
def test_a_step_size_that_is_off_mends_itself(alpha):
    rng = np.random.default_rng(0)
    curvature = jnp.asarray(np.geomspace(0.1, 3.0, 30), jnp.float32)
    target = jnp.asarray(rng.normal(size=30), jnp.float32)

    def loss(params, noise):
        return jnp.mean(curvature * (params["w"] - target - noise) ** 2)

    params = {"w": jnp.zeros(30)}
    structure = gmn_lopt.analyze(loss, params, jnp.zeros(30))

    def final(adapt):
        lopt = LearnedOptimizer(structure, "sgdm", base="adam", adapt=adapt)
        phi = lopt.init(jax.random.key(0)) | {"log_alpha": jnp.log(alpha)}
        tx = lopt.optimizer(phi)

        def step(carry, key):
            params, state = carry
            grads = jax.grad(loss)(params, 0.3 * jax.random.normal(key, (30,)))
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), loss(params, jnp.zeros(30))

        losses = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(jax.random.key(1), 2000))[1]
        return float(losses[-200:].mean())

    adapted = final(True)
    assert adapted < 0.01  # of about 1 at the start
    if alpha > 0.1:
        assert adapted < 0.2 * final(False)


@pytest.mark.parametrize("scheduled", [1.0, 0.01])
def test_step_sizes_grow_back_to_the_first_and_no_further(scheduled):
    state, phi = init_step_size({"w": jnp.zeros(3)}), with_coefficients({}, gain=0.1)
    for t in range(100):  # a gradient that never changes
        state = adapt_step_size(phi, state, {"w": jnp.ones(3)}, jnp.asarray(t), jnp.float32(scheduled))
        state = state._replace(update={"w": -jnp.ones(3)})
    assert float(scheduled * jnp.exp(state.log_factor[0])) == pytest.approx(1.0, rel=1e-5)


def test_a_learning_rate_that_is_given_is_left_alone():
    options = {"backbone": "celo", "width": 4, "gradmetanet": None, "rule": "normalized", "base": "adam"}
    plain, adapting = (LearnedOptimizer(STRUCTURE, adapt=adapt, decay=True, **options) for adapt in (False, True))
    phi = with_coefficients(lively(plain))
    (params, grads, _), *_ = RECORDED
    for rate in (0.01, optax.cosine_decay_schedule(0.01, 10)):
        tx, reference = adapting.optimizer(phi, rate), plain.optimizer(lively(plain), rate)
        state, other = tx.init(params), reference.init(params)
        assert state.step_size == ()
        for _ in range(3):
            found, state = tx.update(grads, state, params)
            expected, other = reference.update(grads, other, params)
            assert relative_difference(found, expected) == 0


def test_neither_the_gradients_size_nor_zeros_matter():
    phi = with_coefficients({}, overshoot=1e-9)

    def factors(scale, update_scale=None):
        update_scale = 1 / scale if update_scale is None else update_scale
        state = init_step_size(jax.tree.map(jnp.zeros_like, MODEL[1]))
        for t, (_, grads, _) in enumerate(RECORDED):
            state = adapt_step_size(phi, state, jax.tree.map(lambda g: scale * g, grads), jnp.asarray(t), ROOM)
            state = state._replace(update=jax.tree.map(lambda g: -update_scale * g, grads))
        return np.array(jax.tree.leaves(state.log_factor))

    assert np.abs(factors(1.0)).max() > 0.5
    np.testing.assert_allclose(factors(1e-15), factors(1.0), rtol=1e-3)
    np.testing.assert_allclose(factors(1e15), factors(1.0), rtol=1e-3)
    np.testing.assert_allclose(factors(0.0, 1.0), 0.0, atol=1e-7)
    np.testing.assert_allclose(factors(1.0, 0.0), 0.0, atol=1e-7)


def test_derivatives_go_through_the_coefficients_only():
    def total(log_gain, scale):
        phi = with_coefficients({}) | {"log_gain": log_gain}
        state = init_step_size(jax.tree.map(jnp.zeros_like, MODEL[1]))
        for t, (_, grads, _) in enumerate(RECORDED):
            state = adapt_step_size(phi, state, grads, jnp.asarray(t), ROOM)
            state = state._replace(update=jax.tree.map(lambda g: -scale * g - 0.1, grads))
        return state.log_factor.sum()

    value, (by_gain, by_scale) = jax.value_and_grad(total, argnums=(0, 1))(jnp.float32(-1.0), jnp.float32(1.0))
    assert float(by_gain) == pytest.approx(float(value), rel=1e-4)  # c is proportional to the gain
    assert by_scale == 0
