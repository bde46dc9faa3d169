"""Step sizes of a known number of steps: the schedule, and the controller that learns to read the set."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizing import analyzed, lively, mlp, residual

import gmn_lopt
from gmn_lopt import Denoised, LearnedOptimizer, Momentum
from gmn_lopt.networks.gradmetanet import GradMetaNetConfig
from gmn_lopt.networks.gradmetanet_pp import GradMetaNetPlusPlusConfig
from gmn_lopt.optimizers.controlled import LEAST, MOST, STATISTICS_DECAY, Controlled, statistics
from gmn_lopt.optimizers.horizon import Horizon, known_horizon
from gmn_lopt.optimizers.leaves import factors_per_element
from gmn_lopt.optimizers.set_reader import SetReader

MODEL = mlp(5, 6, 3)
STRUCTURE = analyzed(MODEL)
READERS = {
    "without the set": None,
    "GradMetaNet": SetReader(GradMetaNetConfig(width=4, set_layers=1), decays=()),
    "GradMetaNet, with averages": SetReader(GradMetaNetConfig(width=4, set_layers=1), decays=(0.9,)),
    "GradMetaNet++": SetReader(GradMetaNetPlusPlusConfig(width=4, blocks=1, heads=2), decays=()),
}


def step_of(lopt, phi, model=MODEL, steps=1, **settings):
    """The updates of some steps, all at the same parameters and batch."""
    loss, params, args = model
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *args)
    tx = lopt.optimizer(phi, **{"total_steps": 50} | settings)
    state, made = tx.init(params), []
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state, params, factors=factors)
        made.append(updates)
    return made, state


def test_the_schedule_is_a_warm_up_and_a_cosine():
    rate, steps = known_horizon(199, peak=0.02, warmup=0.1), jnp.arange(260)
    expected = optax.warmup_cosine_decay_schedule(0.0, 0.02, 20, 200)
    np.testing.assert_allclose(jax.vmap(rate)(steps), jax.vmap(expected)(steps + 1), atol=1e-8)
    assert known_horizon(1, peak=0.02)(jnp.int32(0)) > 0.01
    two = jax.vmap(known_horizon(199, peak=0.02, warmup=0.0, power=2.0))(steps)
    np.testing.assert_allclose(two, 0.02 * np.cos(np.pi / 2 * np.minimum(1, (steps + 1) / 200)) ** 4, atol=1e-8)


def test_the_number_of_steps_needs_a_largest_step_size_where_the_direction_has_no_size():
    lopt = LearnedOptimizer(STRUCTURE, Momentum())
    phi = lopt.init(jax.random.key(0))
    with pytest.raises(ValueError, match="total_steps needs a learning_rate"):
        lopt.optimizer(phi, total_steps=10)
    assert lopt.optimizer(phi, learning_rate=0.1, total_steps=10).init(MODEL[1]).step_size == ()


def test_statistics_are_those_of_dense_gradients_of_biases():
    """A bias's gradient of an example is the tangent itself, so a Jacobian of each example is an independent answer."""
    loss, params, (x, labels) = MODEL
    _, _, factors = gmn_lopt.value_grad_and_factors(loss)(params, x, labels)
    found = statistics(STRUCTURE, factors_per_element(STRUCTURE, factors))
    each = jax.vmap(lambda x, y: jax.grad(loss)(params, x[None], y[None]))(x, labels)
    for layer in range(2):
        g = np.asarray(each[layer]["b"], np.float64)
        squares = np.sum(g**2, axis=1)
        size, fourth = squares.mean(), np.mean(squares**2)
        literal = np.log([len(g) * np.sum(g.mean(0) ** 2) / size, size, fourth / size**2])
        # The leaves are the bias and the kernel of each layer; both are written by the same tangents.
        for leaf in (2 * layer, 2 * layer + 1):
            np.testing.assert_allclose(found[leaf], literal, rtol=1e-4)


def test_averages_of_statistics_are_corrected_for_their_start_and_what_is_not_finite_does_not_stay():
    lopt = LearnedOptimizer(STRUCTURE, Denoised(), step_size=Controlled(reader=READERS["GradMetaNet"]))
    loss, params, args = MODEL
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *args)
    now = np.array(statistics(STRUCTURE, factors_per_element(STRUCTURE, factors)))
    phi = lopt.init(jax.random.key(0))
    _, state = step_of(lopt, phi, steps=3)
    np.testing.assert_allclose(state.step_size.first, now[:, 1], rtol=1e-5)
    now[:, 1] = 0.0  # the same batch: nothing is learned
    assert np.abs(now[:, [0, 2]]).min() > 0.01
    expected = (1 - STATISTICS_DECAY**3) * np.clip(now, LEAST, MOST)
    np.testing.assert_allclose(state.step_size.statistics, expected, rtol=1e-4, atol=1e-5)
    tx, broken = lopt.optimizer(phi, total_steps=10), jax.tree.map(lambda x: x * jnp.nan, factors)
    _, state = tx.update(grads, tx.init(params), params, factors=broken)
    assert jnp.isfinite(state.step_size.statistics).all() and jnp.isfinite(state.step_size.first).all()


def test_weights_are_decayed_by_the_step_size_times_the_coefficient_unless_the_user_says_otherwise():
    lopt = LearnedOptimizer(STRUCTURE, Denoised(), step_size=Horizon(decay=0.2))
    phi, params = lopt.init(jax.random.key(0)), MODEL[1]
    rate = known_horizon(50)(jnp.int32(0))
    (without,), _ = step_of(lopt, phi, weight_decay=0.0)
    for settings, decay in (({}, 0.2), ({"weight_decay": 0.7}, 0.7)):
        (found,), _ = step_of(lopt, phi, **settings)
        expected = jax.tree.map(lambda u, theta: u - rate * decay * theta, without, params)  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), found, expected)


@pytest.mark.parametrize("name", READERS)
def test_an_untrained_controller_is_the_schedule(name):
    plain = LearnedOptimizer(STRUCTURE, Denoised(), step_size=Horizon())
    lopt = LearnedOptimizer(STRUCTURE, Denoised(), step_size=Controlled(reader=READERS[name]))
    expected, _ = step_of(plain, plain.init(jax.random.key(0)), steps=3)
    found, _ = step_of(lopt, lopt.init(jax.random.key(0)), steps=3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), found, expected)


@pytest.mark.parametrize("name", READERS)
def test_a_controller_multiplies_the_step_of_each_tensor(name):
    """Without decay a lively controller's step is a number times the schedule's, another one for each tensor."""
    plain = LearnedOptimizer(STRUCTURE, Denoised(), step_size=Horizon())
    lopt = LearnedOptimizer(STRUCTURE, Denoised(), step_size=Controlled(reader=READERS[name]))
    (expected,), _ = step_of(plain, plain.init(jax.random.key(0)), weight_decay=0.0)
    (found,), _ = step_of(lopt, shaken(lopt), weight_decay=0.0)
    ratios = []
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        ratio = np.asarray(a / b).ravel()
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)
        ratios.append(ratio[0])
    assert len({round(float(r), 3) for r in ratios}) == len(ratios)
    assert all(np.exp(-1.5) <= r <= np.exp(1.5) for r in ratios)


@pytest.mark.parametrize("name", ["GradMetaNet", "GradMetaNet++"])
def test_a_controller_depends_on_the_set_but_on_neither_its_order_nor_that_of_neurons(name):
    lopt = LearnedOptimizer(STRUCTURE, Momentum(), step_size=Controlled(reader=READERS[name]))
    phi, (loss, params, (x, labels)) = shaken(lopt), MODEL

    def factors_of_steps(params, x, labels, factors=None):
        _, grads, own = gmn_lopt.value_grad_and_factors(loss)(params, x, labels)
        tx = lopt.optimizer(phi, total_steps=50)
        updates, _ = tx.update(grads, tx.init(params), params, factors=factors or own)
        return [float(jnp.linalg.norm(u) / jnp.linalg.norm(g)) for u, g in zip(*map(jax.tree.leaves, (updates, grads)))]

    here = factors_of_steps(params, x, labels)
    np.testing.assert_allclose(factors_of_steps(params, x[::-1], labels[::-1]), here, rtol=1e-4)
    order = np.random.default_rng(0).permutation(6)
    permuted = [
        {"b": params[0]["b"][order], "w": params[0]["w"][:, order]},
        {"b": params[1]["b"], "w": params[1]["w"][order]},
    ]
    np.testing.assert_allclose(factors_of_steps(permuted, x, labels), here, rtol=1e-4)
    _, _, others = gmn_lopt.value_grad_and_factors(loss)(params, 2 - x[::2].repeat(2, 0), labels)
    assert not np.allclose(factors_of_steps(params, x, labels, others), here, rtol=1e-3)


def test_a_controller_fits_models_with_loose_leaves_and_masks():
    model = residual()
    structure = analyzed(model)
    lopt = LearnedOptimizer(structure, Denoised(), step_size=Controlled(reader=READERS["GradMetaNet"]))
    (whole,), _ = step_of(lopt, shaken(lopt), model)
    loss, params, args = model
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *args)
    mask = {name: name != "up" for name in params}
    tx = optax.masked(lopt.optimizer(shaken(lopt), total_steps=50), mask)
    updates, _ = tx.update(grads, tx.init(params), params, factors=factors)
    for name in ("scale", "down", "out"):
        np.testing.assert_allclose(updates[name], whole[name], rtol=2e-2, atol=1e-5)


def test_a_controller_is_saved_and_wants_to_know_the_number_of_steps(tmp_path):
    lopt = LearnedOptimizer(STRUCTURE, Denoised(), step_size=Controlled(reader=READERS["GradMetaNet"]))
    phi = shaken(lopt)
    gmn_lopt.save(tmp_path / "own", lopt, phi)
    loss, params, args = MODEL
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *args)
    tx = gmn_lopt.load(tmp_path / "own", STRUCTURE, total_steps=50)
    updates, _ = tx.update(grads, tx.init(params), params, factors=factors)
    (expected,), _ = step_of(lopt, phi)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), updates, expected)
    with pytest.raises(gmn_lopt.SerializationError, match="give total_steps"):
        gmn_lopt.load(tmp_path / "own", STRUCTURE)
    assert "state:" in gmn_lopt.explain(STRUCTURE, str(tmp_path / "own"))


def test_a_controller_is_learned():
    """The derivative of a step by every weight is there: final losses can be differentiated by them."""
    lopt = LearnedOptimizer(STRUCTURE, Denoised(), step_size=Controlled(reader=READERS["GradMetaNet"]))
    loss, params, args = MODEL
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *args)

    def after(phi):
        tx = lopt.optimizer(phi, total_steps=50)
        updates, _ = tx.update(grads, tx.init(params), params, factors=factors)
        return loss(optax.apply_updates(params, updates), *args)

    by = jax.grad(after)(shaken(lopt))["step_size"]
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(by["network"]))
    assert any(jnp.abs(g).max() > 0 for g in jax.tree.leaves(by["gradmetanet"]))


def shaken(lopt):
    """Meta-parameters under which the controller does something."""
    return lively(lopt, seed=3) | {"direction": lopt.init(jax.random.key(0))["direction"]}
