import doctest

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, cross_entropy, data, jnp_mlp, linen_mlp, remat_mlp

from gmn_lopt import Factors, StructureError, analyze, value_grad_and_factors
from gmn_lopt.factors import structure as structure_module
from gmn_lopt.factors import value_and_grad


def relative_error(a, b):
    return float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-12))


@pytest.mark.parametrize("name", MODELS)
def test_factors_rebuild_the_gradient(name):
    loss, params, args = MODELS[name]()
    structure = analyze(loss, params, *args)
    value, grads, factors = value_grad_and_factors(loss)(params, *args)
    expected_value, expected = jax.value_and_grad(loss)(params, *args)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    rebuilt = structure.treedef.flatten_up_to(structure.reconstruct(factors))
    for parameter, got, dense, want in zip(
        structure.parameters, rebuilt, jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True
    ):
        assert relative_error(dense, want) < 1e-5
        if parameter.status == "factored":
            assert relative_error(got, want) < 1e-5, parameter.name
        elif parameter.status != "partial":
            assert not got.any()


def test_tangents_are_dense_per_example_gradients():
    """One element's outer product is its part of the gradient, by a per-example Jacobian."""
    loss, params, (x, labels) = jnp_mlp()
    _, _, factors = value_grad_and_factors(loss)(params, x, labels)
    per_example = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, x[:, None], labels[:, None])
    for i, layer in enumerate(per_example):
        a, g = factors.activations[i], factors.tangents[i] * len(x)
        np.testing.assert_allclose(jnp.einsum("si,so->sio", a, g), layer["w"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(g, layer["b"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", [jnp_mlp, linen_mlp, MODELS["vmap"], remat_mlp])
def test_factors_cost_one_backward_pass(model):
    loss, params, args = model()
    static = tuple(i + 1 for i, arg in enumerate(args) if isinstance(arg, bool))

    def products(function):
        return str(jax.make_jaxpr(function, static_argnums=static)(params, *args)).count("dot_general[")

    assert products(value_grad_and_factors(loss)) == products(jax.value_and_grad(loss))


def test_transformations():
    loss, params, (x, labels) = jnp_mlp()
    f = value_grad_and_factors(loss)
    _, _, expected = f(params, x, labels)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    _, _, batched = jax.jit(jax.vmap(f, in_axes=(0, None, None)))(stacked, x, labels)
    _, scanned = jax.lax.scan(lambda c, p: (c, f(p, x, labels)[2]), 0, stacked)
    for stack in (batched, scanned):
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], stack), expected, rtol=1e-5, atol=1e-7)


def test_aux_and_static_arguments():
    loss, params, (x, labels) = jnp_mlp()

    def with_aux(params, x, labels, double, scale):
        value = loss(params, x, labels) * scale
        return (2 * value if double else value), {"mean": x.mean(), "name": None}

    (value, aux), grads, factors = value_grad_and_factors(with_aux, has_aux=True)(params, x, labels, True, 1.0)
    (single, _), _, _ = value_grad_and_factors(with_aux, has_aux=True)(params, x, labels, False, 1.0)
    assert value == 2 * single and aux["name"] is None
    structure = analyze(with_aux, params, x, labels, True, 1.0, has_aux=True)
    rebuilt = structure.reconstruct(factors)
    np.testing.assert_allclose(rebuilt[0]["w"], grads[0]["w"], rtol=1e-5, atol=1e-7)


def test_bfloat16_parameters():
    loss, params, args = jnp_mlp()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    structure = analyze(loss, params, *args)
    _, grads, factors = value_grad_and_factors(loss)(params, *args)
    assert jax.tree.leaves(grads)[0].dtype == jnp.bfloat16
    for got, want in zip(jax.tree.leaves(structure.reconstruct(factors)), jax.tree.leaves(grads), strict=True):
        assert relative_error(got.astype(jnp.float32), want.astype(jnp.float32)) < 2e-2


def test_custom_derivatives_are_not_tapped():
    @jax.custom_vjp
    def layer(w, x):
        return x @ w

    layer.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (3 * saved[1].T @ g, g @ saved[0].T))
    w = jax.random.normal(jax.random.key(0), (7, 5))
    x, labels, _ = data()

    def loss(params, x):
        return cross_entropy(layer(params["w"], x) @ params["v"], labels)

    params = {"w": w, "v": jnp.eye(5)}
    structure = analyze(loss, params, x)
    assert {p.name: p.status for p in structure.parameters} == {"['v']": "factored", "['w']": "unfactored"}
    _, grads, _ = value_grad_and_factors(loss)(params, x)
    np.testing.assert_array_equal(grads["w"], jax.grad(loss)(params, x)["w"])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(1, 4), st.booleans())
def test_any_widths_and_batch_size(widths, batch, bias):
    _, params, _ = jnp_mlp(widths=tuple(widths), bias=bias)
    x = jax.random.normal(jax.random.key(1), (batch, widths[0]))

    def loss(params, x):
        for layer in params:
            x = jnp.tanh(x @ layer["w"] + layer.get("b", 0.0))
        return jnp.mean((x - 0.3) ** 2)

    structure = analyze(loss, params, x, strict=True)
    _, grads, factors = value_grad_and_factors(loss)(params, x)
    chex.assert_trees_all_close(structure.reconstruct(factors), grads, rtol=1e-5, atol=1e-6)
    for arrays, shapes in (
        (factors.activations, structure.activation_shapes),
        (factors.tangents, structure.tangent_shapes),
    ):
        chex.assert_shape(arrays, shapes)


def test_wrong_input_is_one_clear_line():
    loss, params, (x, labels) = jnp_mlp()
    with pytest.raises(StructureError, match=r"floating-point scalar.*12"):
        analyze(lambda params, x: (x @ params[0]["w"]).sum(1), params, x)
    with pytest.raises(StructureError, match="has_aux=True"):
        analyze(lambda params, x: (x.sum(), None), params, x)
    with pytest.raises(StructureError, match=r"\[0\]\['n'\] is int"):
        analyze(lambda params: 0.0, [{"n": jnp.ones(3, int)}])
    structure = analyze(loss, params, x, labels)
    _, _, small = value_grad_and_factors(loss)(params, x[:5], labels[:5])
    with pytest.raises(StructureError, match=r"5 elements.*12"):
        structure.reconstruct(small)
    with pytest.raises(StructureError, match="arrays, but 3 in the analysed model"):
        structure.reconstruct(Factors(small.activations[:1], small.tangents))


@pytest.mark.parametrize("module", [structure_module, value_and_grad], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    failed, attempted = doctest.testmod(module)
    assert attempted > 3 and not failed


def test_a_loss_is_traced_at_each_call_as_it_is_by_jax():
    """Outside of jit a loss may read what changes around it, such as a coefficient that is annealed."""
    weight = {"now": 1.0}

    def loss(params, x):
        return weight["now"] * jnp.mean((x @ params["w"]) ** 2)

    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    ours, theirs = value_grad_and_factors(loss), jax.value_and_grad(loss)
    for weight["now"] in (1.0, 2.0, 5.0):
        (value, grads, factors), (expected, want) = ours(params, x), theirs(params, x)
        chex.assert_trees_all_close((value, grads), (expected, want))
        chex.assert_trees_all_close(factors.activations[0].T @ factors.tangents[0], want["w"])


def test_keyword_arguments_are_the_losss():
    def loss(params, x, *, labels, scale=1.0, train=False):
        return scale * cross_entropy(jnp.tanh(x @ params["w"]) * (2.0 if train else 1.0), labels)

    x, labels, _ = data()
    params = {"w": jax.random.normal(jax.random.key(0), (x.shape[1], 5))}
    structure = analyze(loss, params, x, labels=labels, train=True, strict=True)
    keywords = {"labels": labels, "scale": 3.0, "train": True}
    value, grads, factors = value_grad_and_factors(loss)(params, x, **keywords)
    chex.assert_trees_all_close((value, grads), jax.value_and_grad(loss)(params, x, **keywords), rtol=1e-5)
    chex.assert_trees_all_close(structure.reconstruct(factors), grads, rtol=1e-4, atol=1e-6)
