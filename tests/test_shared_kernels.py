"""Kernels that are used several times: their sets of factors are one set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_derived import check, draw

import gmn_lopt
from gmn_lopt import analyze, value_grad_and_factors

PARAMS = draw(a=(6, 8), b=(8,), c=(8, 8), d=(8, 3))
X = jax.random.normal(jax.random.key(1), (12, 6))
Y = jax.random.normal(jax.random.key(2), (12, 3))


def network(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]) @ p["d"]


def whole(p, x, y):
    return jnp.mean((network(p, x) - y) ** 2)


def halves(p, x, y):
    return 0.5 * whole(p, x[:6], y[:6]) + 0.5 * whole(p, x[6:], y[6:])


def unequal(p, x, y):
    return 0.75 * whole(p, x[:9], y[:9]) + 0.25 * whole(p, x[9:], y[9:])


def beside_a_target(p, x, y):
    target = jax.lax.stop_gradient(network(p, 2 * x))
    return whole(p, x, y) + 0.0 * jnp.mean(jax.lax.stop_gradient(target))


def frozen_copy(p, x, y):
    return whole(p, x, y) + 0.0 * jnp.mean(network(jax.lax.stop_gradient(p), 2 * x))


@pytest.mark.parametrize("loss", [halves, unequal, beside_a_target, frozen_copy])
@pytest.mark.parametrize("name", ["default", "default+gmn"])
def test_the_same_function_takes_the_same_steps(name, loss):
    def train(loss):
        params = PARAMS
        tx = gmn_lopt.load(name, analyze(loss, params, X, Y))
        state = tx.init(params)

        @jax.jit
        def step(params, state):
            _, grads, factors = value_grad_and_factors(loss)(params, X, Y)
            updates, state = tx.update(grads, state, params, factors=factors)
            return jax.tree.map(jnp.add, params, updates), state

        for _ in range(3):
            params, state = step(params, state)
        return params

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), train(loss), train(whole))


@pytest.mark.parametrize("loss", [halves, unequal, beside_a_target, frozen_copy])
def test_the_same_function_has_the_same_factors(loss):
    structure, factors = check(loss, PARAMS, X, Y)
    expected, same = check(whole, PARAMS, X, Y)
    assert str(structure) == str(expected)
    for got, want in zip(jax.tree.leaves(factors), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_siamese_and_unrolled():
    def contrastive(p, x, y):
        a, b = network(p, x), network(p, x + 0.1)
        return -jnp.mean(jax.nn.log_softmax(a @ b.T).diagonal())

    def unrolled(p, x, y):
        h = jnp.tanh(x @ p["a"] + p["b"])
        for _ in range(3):
            h = jnp.tanh(h @ p["c"])
        return jnp.mean((h @ p["d"] - y) ** 2)

    structure, _ = check(contrastive, PARAMS, X, Y)
    assert [shape[0] for shape in structure.tangent_shapes] == [24, 24, 24]
    structure, _ = check(unrolled, PARAMS, X, Y)
    assert sorted(shape[0] for shape in structure.tangent_shapes) == [12, 12, 36]


def test_a_kernel_used_once_beside_one_that_is_used_twice():
    def loss(p, x, y):
        h, k = jnp.tanh(x @ p["a"]), jnp.tanh((2 * x) @ p["a"])
        return jnp.mean((h @ p["c"] + k) ** 2) + jnp.mean((k + p["b"]) @ p["d"])

    structure, _ = check(loss, PARAMS, X, Y)
    assert {p.name for p in structure.parameters if p.status == "factored"} == {"['a']", "['c']", "['d']"}


def test_branches():
    """Of a branch that is not taken activations and tangents are zeros."""

    def loss(p, x, y, which):
        h = jnp.tanh(x @ p["a"] + p["b"])
        h = jax.lax.cond(which == 0, lambda h: jnp.tanh(h @ p["c"]), lambda h: 2 * h, h)
        branches = [lambda h: h @ p["d"], lambda h: jnp.sin(h) @ p["d"], lambda h: h[:, :3]]
        return jnp.mean((jax.lax.switch(which, branches, h) - y) ** 2)

    for which in range(3):
        structure, factors = check(loss, PARAMS, X, Y, jnp.int32(which))
        assert {p.status for p in structure.parameters} == {"factored"}, str(structure)
        c = next(layer for layer in structure.layers if structure.parameters[layer.kernel].name == "['c']")
        assert bool(jnp.all(factors.tangents[c.tangent] == 0)) == (which != 0)


def test_branches_in_loops():
    def loss(p, x, y, which):
        def body(h, i):
            return jax.lax.cond(i == which, lambda h: jnp.tanh(h @ p["c"]), lambda h: 1.1 * h, h), None

        h, _ = jax.lax.scan(jax.checkpoint(body), jnp.tanh(x @ p["a"] + p["b"]), jnp.arange(3))
        return jnp.mean((h @ p["d"] - y) ** 2)

    structure, _ = check(loss, PARAMS, X, Y, jnp.int32(1))
    assert {p.status for p in structure.parameters} == {"factored"}, str(structure)


def test_what_cannot_be_tapped_is_said():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

    def loss(p, x, y):
        return jnp.mean((product(jnp.tanh(x @ p["a"] + p["b"]) @ p["c"], p["d"]) - y) ** 2)

    structure, _ = check(loss, PARAMS, X, Y)
    odd = {p.name: p.reason for p in structure.parameters if p.status != "factored"}
    assert list(odd) == ["['d']"] and "inside a function with a derivative of its own" in odd["['d']"]


def test_derivatives_in_the_input_are_uses_of_the_same_kernels():
    """A loss of the second derivative, by forward mode: products of tangents have no bias."""

    def residual(p, x):
        u = lambda x: network(p, x)[0]  # noqa: E731
        direction = jnp.ones_like(x)
        return jax.jvp(lambda x: jax.jvp(u, (x,), (direction,))[1], (x,), (direction,))[1]

    def loss(p, x, y):
        return jnp.mean((jax.vmap(residual, (None, 0))(p, x) - y[:, 0]) ** 2)

    structure, _ = check(loss, PARAMS, X, Y)
    assert {p.status for p in structure.parameters} == {"factored"}, str(structure)
    kernels = [structure.parameters[layer.kernel].name for layer in structure.layers]
    assert sorted(kernels) == ["['a']", "['c']", "['d']"], str(structure)


def test_convolutions_of_two_views():
    params = draw(k=(3, 3, 1, 4), out=(4, 2))
    images = jax.random.normal(jax.random.key(5), (6, 8, 8, 1))

    def loss(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        u = jax.lax.conv_general_dilated(x, p["k"], (2, 2), "SAME", dimension_numbers=numbers)
        return jnp.mean((jnp.tanh(u).mean((1, 2)) @ p["out"]) ** 2)

    def both(p, x):
        return 0.5 * loss(p, x[:3]) + 0.5 * loss(p, x[3:])

    structure, factors = check(both, params, images)
    expected, same = check(loss, params, images)
    assert str(structure) == str(expected)
    for got, want in zip(jax.tree.leaves(factors), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    tx = [gmn_lopt.load("default", of) for of in (structure, expected)]
    updates = [t.update(jax.grad(loss)(params, images), t.init(params), params, factors=same)[0] for t in tx]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *updates)
