"""Our optimizers in learned_optimization's interfaces: against the same training run with optax."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gmn_lopt import load, recipe, value_grad_and_factors
from gmn_lopt.interop.learned_optimization import LearnedOptimizer, Optimizer, TruncatedStep, to_task
from gmn_lopt.meta.task import task_structure
from interop import stubs


def trees_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["default", "adam"])
def test_training_is_that_of_optax(name):
    task = to_task(stubs.MLP(), batches=10)
    tx = load("default", task_structure(task)) if name == "default" else optax.adam(1e-2)
    opt, params = Optimizer(tx), task.init(jax.random.key(0))
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(carry, batch):
        params, state = carry
        _, grads, factors = value_grad_and_factors(task.loss)(params, batch)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def step_of_theirs(state, batch):
        value, grads, factors = value_grad_and_factors(task.loss)(opt.get_params(state), batch)
        return opt.update(state, grads, loss=value, model_state="kept", factors=factors)._replace(state=None)

    carry, state = (params, tx.init(params)), opt.init(params, None, num_steps=4, key=jax.random.PRNGKey(0))
    for i in range(4):
        batch = task.sample(jax.random.key(i), task.data["train"])
        carry, state = step(carry, batch), step_of_theirs(state, batch)
    trees_equal(carry, (state.params, state.optax_opt_state))
    assert int(state.iteration) == 4
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(state.params)))


def test_the_interface():
    opt = Optimizer(optax.sgd(0.5), name="half")
    state = opt.init(jnp.ones(2), "model state")
    assert opt.get_params_state(state) == (opt.get_params(state), opt.get_state(state)) == (state.params, "model state")
    state = opt.update(opt.set_params(state, jnp.full(2, 3.0)), jnp.ones(2), model_state="new", unknown=1)
    np.testing.assert_array_equal(state.params, [2.5, 2.5])
    assert (state.state, opt.name) == ("new", "half")
    assert {opt: 1}[opt] == 1 and opt != Optimizer(opt.opt, name="half")  # a static argument


def test_without_factors_the_error_says_what_is_missing():
    task = to_task(stubs.MLP(), batches=10)
    params = task.init(jax.random.key(0))
    opt = Optimizer(load("default", task_structure(task)))
    with pytest.raises(ValueError, match="reads the factors of the gradient"):
        opt.update(opt.init(params), params, loss=jnp.float32(1))


def test_the_loss_is_handed_on():
    opt = Optimizer(optax.polyak_sgd())
    state = opt.update(opt.init(jnp.float32(2)), jnp.float32(4), loss=jnp.float32(4))  # x^2 at 2: the step to 1
    assert float(state.params) == pytest.approx(1.0)


@pytest.mark.parametrize("recipe_name", ["ds", "ds+gmn"])
def test_a_truncated_step_is_a_training_step(recipe_name):
    """In it, factors or not: the same losses and parameters as a loop of optax."""
    theirs = stubs.MLP()
    lopt = recipe(recipe_name, task_structure(to_task(theirs, batches=10)))
    step = TruncatedStep(theirs, LearnedOptimizer(lopt), unroll_length=3)
    theta = step.outer_init(jax.random.key(0))
    trees_equal(theta, lopt.init(jax.random.key(0)))
    state, data = step.init_step_state(theta, None, jax.random.PRNGKey(1)), step.get_batch(3)
    assert data["image"].shape == (3, 8, stubs.SIDE, stubs.SIDE, 1)
    tx, params = lopt.optimizer(theta), state.inner_opt_state.params
    opt_state, unroll, losses, expected = tx.init(params), jax.jit(step.unroll_step), [], []
    for i in range(3):
        batch = jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), data)
        key = jax.random.PRNGKey(i)
        state, out = unroll(theta, state, key, batch, None)
        losses.append(out.loss)
        assert (bool(out.is_done), bool(out.mask), int(out.iteration)) == (False, True, i + 1)
        loss = lambda params, batch, key=key: theirs.loss(params, jax.random.split(key)[0], batch)  # noqa: E731
        value, grads, factors = value_grad_and_factors(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
        params = optax.apply_updates(params, updates)
        expected.append(value)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.inner_opt_state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # The step after the last one begins a new episode.
    state, out = unroll(theta, state, jax.random.PRNGKey(9), batch, None)
    assert (bool(out.is_done), bool(out.mask), float(out.loss), int(state.inner_step)) == (True, False, 0.0, 0)
    assert int(state.inner_opt_state.iteration) == 0
    meta_loss = step.meta_loss_batch(theta, state, jax.random.PRNGKey(0), batch, None)
    np.testing.assert_allclose(meta_loss, theirs.loss(state.inner_opt_state.params, jax.random.PRNGKey(0), batch))


def quadratic_step(theirs, **settings):
    structure = task_structure(to_task(stubs.Quadratic()))
    return TruncatedStep(theirs, LearnedOptimizer(recipe("sgdm", structure), "mine"), **settings)


def test_a_model_state_is_carried():
    step = quadratic_step(stubs.Counting(), unroll_length=5)
    theta, key = step.outer_init(jax.random.key(0)), jax.random.PRNGKey(0)
    state = step.init_step_state(theta, None, key)
    for i in range(3):
        before = float(jnp.sum(state.inner_opt_state.params**2))
        state, out = step.unroll_step(theta, state, key, (), None)
        assert float(out.loss) == pytest.approx((1 + i) * before, rel=1e-5)
    assert float(state.inner_opt_state.state) == 3
    assert step.get_batch(2) == step.get_outer_batch() == ()
    assert (step.task_name(), step.cfg_name()) == ("Counting", "mine")


def test_losses_are_normalised_as_the_task_says():
    theirs = stubs.Quadratic()
    theirs.normalizer = lambda loss: jnp.clip(loss, 0, 0.25)
    step = quadratic_step(theirs, unroll_length=5)
    theta, key = step.outer_init(jax.random.key(0)), jax.random.PRNGKey(0)
    state, out = step.unroll_step(theta, step.init_step_state(theta, None, key), key, (), None)
    assert float(out.loss) == float(step.meta_loss_batch(theta, state, key, (), None)) == 0.25


def test_their_estimators_ask_for_many_at_once():
    """Each unroll has a task, meta-parameters and a first step of its own; the gradient is that of evolution."""
    step = quadratic_step(stubs.Family(), unroll_length=4, random_initial_iteration_offset=4)
    many, thetas = stubs.VectorizedTruncatedStep(step, 6), step.outer_init(jax.random.key(0))
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 3 + [x - 3] * 3), thetas)
    keys = jax.random.split(jax.random.PRNGKey(1), 2)
    state = many.init_step_state(stacked, None, keys[0], theta_is_vector=True)
    assert len(np.unique(state.inner_step)) > 1 and len(np.unique(state.task_param, axis=0)) == 6
    start, sampled = state.inner_step, state.task_param
    unroll = jax.jit(lambda state, key: many.unroll_step(stacked, state, key, (), None, True))
    outs = []
    for key in jax.random.split(keys[1], 5):
        state, out = unroll(state, key)
        outs.append(out)
    done = np.stack([out.is_done for out in outs])
    assert (done.argmax(0) == 4 - start).all() and (done.sum(0) == 1).all()
    masks = np.stack([out.mask for out in outs])
    assert (masks == ~done).all()
    assert (np.asarray(state.task_param) != np.asarray(sampled)).any(axis=1).all()
    assert outs[0].replace(loss=0).loss == 0  # as estimators do


def test_gradients_go_through_a_truncated_step():
    """Their back-propagation: the derivative in the meta-parameters, against a difference quotient."""
    step = quadratic_step(stubs.Quadratic(), unroll_length=9)
    theta, key = step.outer_init(jax.random.key(0)), jax.random.PRNGKey(0)

    def loss(shift):
        shifted = jax.tree.map(lambda x: x + shift, theta)
        state = step.init_step_state(shifted, None, key)
        for _ in range(3):
            state, out = step.unroll_step(shifted, state, key, (), None)
        return out.loss

    quotient = (loss(0.01) - loss(-0.01)) / 0.02
    np.testing.assert_allclose(jax.grad(loss)(0.0), quotient, rtol=1e-2)
    assert SimpleNamespace(step=hash(step)).step == hash(step)  # a static argument
