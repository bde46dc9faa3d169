"""Training loops as flax's documentation writes them: ``nnx.Optimizer`` and linen's ``TrainState``."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import gmn_lopt
from gmn_lopt import StructureError

X, Y = jax.random.normal(jax.random.key(0), (16, 4)), jnp.arange(16) % 3


def error(outputs):
    return jnp.mean((outputs - jax.nn.one_hot(Y, 3)) ** 2)


def by_hand(loss, params, tx, steps=3):
    """The parameters after some steps of optax's own loop."""
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, X)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params


def assert_equal(tree, other):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 3, rngs=rngs)])

    def __call__(self, x):
        return self.layers[0](nnx.relu(self.norm(self.hidden(x))))


def nnx_loss(model, x):
    return error(model(x))


def split(model):
    graph, params = nnx.split(model, nnx.Param)
    return params, lambda params, x: nnx_loss(nnx.merge(graph, params), x)


def pure(model):
    params, loss = split(model)
    return nnx.as_pure(params), loss


def whole(model):
    return model, nnx_loss


def names(structure):
    return [parameter.name for parameter in structure.parameters]


@pytest.mark.parametrize("analysed", [split, pure, whole])
@pytest.mark.parametrize("differentiated", [split, whole])
def test_nnx_optimizer_takes_a_structure_however_it_was_found(analysed, differentiated):
    """The names of the parameters are those of the model, of its state, or of its state without Variables."""
    params, loss = analysed(Model(nnx.Rngs(0)))
    tx = gmn_lopt.load("default", gmn_lopt.analyze(loss, params, X), learning_rate=0.1)
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params, loss = differentiated(model)
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, X)
    optimizer.update(model, grads, factors=factors)
    params, loss = split(Model(nnx.Rngs(0)))
    assert_equal(nnx.state(model, nnx.Param), by_hand(loss, params, tx, steps=1))


@pytest.mark.parametrize("name", ["default", "default+gmn"])
def test_nnx_loop(name):
    model = Model(nnx.Rngs(0))
    tx = gmn_lopt.load(name, gmn_lopt.analyze(nnx_loss, model, X))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        loss, grads, factors = gmn_lopt.value_grad_and_factors(nnx_loss)(model, X)
        optimizer.update(model, grads, factors=factors)
        return loss

    for _ in range(3):
        train_step(model, optimizer)
    params, loss = split(Model(nnx.Rngs(0)))
    assert_equal(nnx.state(model, nnx.Param), by_hand(loss, params, tx))


def test_an_nnx_model_with_other_state_is_split():
    class Normalized(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.hidden(x)))

    model = Normalized(nnx.Rngs(0))

    def loss(params, rest, x):
        copy = nnx.merge(nnx.graphdef(model), params, rest)
        return nnx_loss(copy, x), nnx.state(copy, nnx.Not(nnx.Param))

    states = nnx.state(model, nnx.Param, ...)
    tx = gmn_lopt.load("default", gmn_lopt.analyze(loss, *states, X, has_aux=True))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        params, rest = nnx.state(model, nnx.Param, ...)
        (value, rest), grads, factors = gmn_lopt.value_grad_and_factors(loss, has_aux=True)(params, rest, X)
        optimizer.update(model, grads, factors=factors)
        nnx.update(model, rest)
        return value

    before = model.hidden.kernel[...]
    train_step(model, optimizer)
    assert jnp.abs(model.norm.mean[...]).max() > 0 and model.dropout.rngs.count[...] == 1
    assert jnp.abs(model.hidden.kernel[...] - before).max() > 0


def test_parameters_are_named_without_their_variables():
    params, loss = split(Model(nnx.Rngs(0)))
    assert names(gmn_lopt.analyze(loss, params, X))[:2] == ["['hidden']['bias']", "['hidden']['kernel']"]


def test_another_model_is_still_refused():
    tx = gmn_lopt.load("default", gmn_lopt.analyze(nnx_loss, Model(nnx.Rngs(0)), X))
    with pytest.raises(StructureError, match=r"parameter \['bias'\] is not in the analysed model"):
        nnx.Optimizer(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)


class TrainState(train_state.TrainState):
    """As flax's documentation adds a field."""

    key: jax.Array


def linen():
    model = nn.Sequential([nn.Dense(8), nn.LayerNorm(), nn.relu, nn.Dense(3)])
    params = model.init(jax.random.key(0), X)["params"]
    return model, params, lambda params, x: error(model.apply({"params": params}, x))


@pytest.mark.parametrize("name", ["default", "default+gmn"])
def test_linen_loop(name):
    model, params, loss = linen()
    tx = gmn_lopt.load(name, gmn_lopt.analyze(loss, params, X))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx, key=jax.random.key(0))

    @jax.jit
    def train_step(state):
        value, grads, factors = gmn_lopt.value_grad_and_factors(loss)(state.params, X)
        key = jax.random.fold_in(state.key, 1)
        return gmn_lopt.apply_gradients(state, grads=grads, factors=factors, key=key), value

    first = state
    for _ in range(3):
        state, _ = train_step(state)
    assert state.step == 3 and state.tx is tx and state.key != first.key
    assert train_step._cache_size() == 1 + (type(first.step) is int)  # flax's first step is a Python integer
    assert_equal(state.params, by_hand(loss, params, tx))


@pytest.mark.parametrize("tx", [optax.adam(1e-2), optax.MultiSteps(optax.sgd(1e-2), 2)])
def test_optimizers_that_know_no_factors(tx):
    model, params, loss = linen()
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, X)
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    stepped = gmn_lopt.apply_gradients(state, grads=grads, factors=factors)
    assert_equal(stepped.params, state.apply_gradients(grads=grads).params)
