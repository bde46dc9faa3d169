"""Loops: layers that are stacked and scanned over, layers that every iteration shares, and what is not claimed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import permute
import pytest

from gmn_lopt import analyze, value_grad_and_factors
from gmn_lopt.networks.site_features import mean_over_copies


def draw(**shapes):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32) for name, shape in shapes.items()}


PARAMS = draw(first=(7, 4), up=(3, 4, 5), down=(3, 5, 4), gain=(5,), out=(4, 2))
X = draw(x=(6, 7))["x"]


def blocks(p, hidden=lambda p, h: h, extra=lambda p, hs: 0.0, order=lambda w: w, reverse=False):
    def step(x, w):
        h = hidden(p, jnp.tanh(x @ w[0]))
        return x + h @ w[1], h

    x, hs = jax.lax.scan(step, X @ p["first"], (p["up"], order(p["down"])), reverse=reverse)
    return jnp.mean((x @ p["out"]) ** 3) + extra(p, hs)


def carried(p):
    def step(carry, w):
        x, before = carry
        h = jnp.tanh(x @ w[0] + before)
        return (x + h @ w[1], h), None

    (x, _), _ = jax.lax.scan(step, (X @ p["first"], jnp.zeros((6, 5))), (p["up"], p["down"]))
    return jnp.mean((x @ p["out"]) ** 3)


# Whether the hidden neurons are permutable, and whether in each layer by itself.
LOOPS = {
    "stack": (blocks, True, True),
    "from the last to the first": (lambda p: blocks(p, reverse=True), True, True),
    "shared gain": (lambda p: blocks(p, hidden=lambda p, h: h * p["gain"]), True, False),
    "hidden layers summed": (lambda p: blocks(p, extra=lambda p, hs: jnp.sin(hs.sum(0)).sum()), True, False),
    "hidden layers returned": (lambda p: blocks(p, extra=lambda p, hs: jnp.einsum("lsf,msf->", hs, hs)), True, False),
    "used outside": (
        lambda p: blocks(p, extra=lambda p, hs: jnp.sum(jnp.einsum("ldf,mdf->lm", p["up"], p["up"]) ** 3)),
        True,
        False,
    ),
    "another order": (lambda p: blocks(p, order=lambda w: w[::-1]), True, False),
    "carried": (carried, True, False),
    "by position": (lambda p: blocks(p, hidden=lambda p, h: jnp.cumsum(h, -1)), False, None),
    "by position outside": (lambda p: blocks(p, extra=lambda p, hs: hs[..., 0].sum()), False, None),
}


@pytest.mark.parametrize("name", LOOPS)
def test_what_is_claimed_of_a_loop_holds(name):
    loss, permutable, apart = LOOPS[name]
    structure = analyze(loss, PARAMS)
    parameters = {p.name: p for p in structure.parameters}
    hidden = structure.spaces[parameters["['up']"].spaces[-1]]
    assert hidden.permutable == permutable
    if permutable:
        assert bool(hidden.stack) == apart
    compute = jax.jit(lambda p: (loss(p), *value_grad_and_factors(loss)(p)))
    plain, value, grads, factors = compute(PARAMS)
    np.testing.assert_allclose(plain, value, rtol=1e-5)
    rebuilt = structure.reconstruct(factors, PARAMS)
    for parameter in structure.parameters:
        if parameter.status == "factored":
            key = parameter.name[2:-2]
            np.testing.assert_allclose(rebuilt[key], grads[key], rtol=1e-4, atol=1e-6)
    assert parameters["['down']"].status == "factored"
    for seed in (1, 2):
        permuted = permute.parameters(structure, permute.draw(structure, seed), PARAMS)
        np.testing.assert_allclose(compute(permuted)[0], value, rtol=1e-4)


def test_the_stream_of_stacked_layers_is_copies_of_one_space():
    structure = analyze(blocks, PARAMS)
    by_name = {p.name: p for p in structure.parameters}
    stream, hidden = (structure.sites[ref.site] for ref in by_name["['up']"].sites)
    assert (stream.size, hidden.size) == (12, 15) and hidden.copies == ()
    assert [structure.spaces[stream.spaces[d]].size for d in stream.copies] == [3]
    outer = structure.sites[by_name["['first']"].sites[1].site]
    sites = [structure.sites.index(site) for site in (outer, stream, hidden)]
    values = [np.random.default_rng(i).normal(size=structure.sites[s].size) for i, s in enumerate(sites)]
    means = mean_over_copies(structure, sites, [jnp.asarray(v) for v in values], axis=0)
    order = [stream.spaces.index(i) for i in (*outer.spaces, *(stream.spaces[d] for d in stream.copies))]
    sizes = [structure.spaces[i].size for i in stream.spaces]
    copies = values[1].reshape(sizes).transpose(order)  # [stream, layers]
    expected = (values[0] + copies.sum(1)) / 4
    np.testing.assert_allclose(means[0], expected, rtol=1e-5)
    again = np.asarray(means[1]).reshape(sizes).transpose(order)
    np.testing.assert_allclose(again, np.broadcast_to(expected[:, None], (4, 3)), rtol=1e-5)
    assert means[2] is None


def test_a_recurrent_layer_has_time_in_its_set():
    params = draw(w=(3, 5), u=(5, 5), b=(5,), out=(5, 2))
    xs = draw(x=(4, 6, 3))["x"]

    def loss(p):
        def step(h, x):
            h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
            return h, h @ p["out"]

        _, ys = jax.lax.scan(step, jnp.zeros((6, 5)), xs)
        return jnp.mean(ys**3)

    structure = analyze(loss, params, strict=True)
    assert [site.set_size for site in structure.sites] == [24] * len(structure.sites)
    _, grads, factors = jax.jit(value_grad_and_factors(loss))(params)
    chex.assert_trees_all_close(structure.reconstruct(factors), grads, rtol=1e-4, atol=1e-6)


def test_loops_in_loops():
    params = draw(first=(7, 4), up=(2, 3, 4, 5), down=(2, 3, 5, 4), bias=(2, 3, 5))

    def loss(p):
        @jax.checkpoint
        def inner(x, w):
            return x + jnp.tanh(x @ w["up"] + w["bias"]) @ w["down"], None

        stack = {name: p[name] for name in ("up", "down", "bias")}
        x, _ = jax.lax.scan(lambda x, w: jax.lax.scan(inner, x, w), X @ p["first"], stack)
        return jnp.mean(x**3)

    structure = analyze(loss, params, strict=True)
    _, grads, factors = jax.jit(value_grad_and_factors(loss))(params)
    chex.assert_trees_all_close(structure.reconstruct(factors), grads, rtol=1e-4, atol=1e-6)
