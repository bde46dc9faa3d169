"""Layers that take the denoised step as stacks of matrices: those of one shape, and those that are scanned over."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import transformers
from optimizing import mlp, relative_difference

import gmn_lopt
from gmn_lopt.factors import Embedding
from gmn_lopt.optimizers.directions import denoised_layers
from gmn_lopt.optimizers.directions.denoised_layers import (
    activations_and_noise,
    as_matrices,
    from_matrices,
    layer_groups,
    read_sets,
)
from gmn_lopt.optimizers.directions.preconditioners import init_preconditioner


def embedding_with_bias():
    params = {"table": jnp.arange(10.0).reshape(5, 2), "bias": jnp.ones(2), "out": jnp.ones((2, 3))}
    loss = lambda p, ids: jnp.mean(jnp.sin((p["table"][ids] + p["bias"]) @ p["out"]))  # noqa: E731
    return loss, params, (jnp.array([[0, 1, 1], [3, 1, 0]]),)


def differential_equation():
    """A network whose derivatives in the input are in the loss: those pass by its kernels, and not by its biases."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"v": jax.random.normal(keys[0], (3, 4)), "w": jax.random.normal(keys[1], (4, 1))}
    params |= {"b": jax.random.normal(keys[2], (4,)), "c": jnp.ones(1)}
    u = lambda p, x: (jnp.tanh(x @ p["v"] + p["b"]) @ p["w"] + p["c"])[:, 0]  # noqa: E731

    def loss(p, x):
        value, slope = jax.jvp(lambda x: u(p, x), (x,), (jnp.ones_like(x),))
        return jnp.mean((slope - value) ** 2) + jnp.mean(u(p, x[:2] + 1) ** 2)

    return loss, params, (jax.random.normal(keys[3], (6, 3)),)


def one_output():
    _, params, batch = differential_equation()
    return lambda p, x: jnp.mean((jnp.tanh(x @ p["v"] + p["b"]) @ p["w"] + p["c"] - 1) ** 2), params, batch


PROBLEMS = (
    {"embedding with bias": embedding_with_bias, "equation": differential_equation, "one output": one_output}
    | models.MODELS
    | {name: make for name, (make, _) in transformers.MODELS.items()}
)


@pytest.mark.parametrize("name", PROBLEMS)
def test_matrices_of_the_gradient_are_the_products_of_those_of_the_factors(name):
    loss, params, batch = PROBLEMS[name]()
    structure = gmn_lopt.analyze(loss, params, *batch)
    _, grads, factors = jax.jit(gmn_lopt.value_grad_and_factors(loss))(params, *batch)
    leaves = jax.tree.leaves(grads)
    groups = layer_groups(structure, range(len(leaves)))
    found = {structure.parameters[layer.kernel].name for group in groups for layer in group.layers}
    kernels = [structure.parameters[layer.kernel].name for layer in structure.layers]
    assert found <= set(kernels)
    assert found or "tied" in name or name == "jnp one neuron"
    for group in groups:
        matrices = as_matrices(group, structure.parameters, leaves)
        assert matrices.shape == (len(group.reads), group.inputs, group.outputs)
        for position, leaf in from_matrices(group, structure.parameters, matrices).items():
            np.testing.assert_array_equal(leaf, leaves[position])
        distinct, tangents = activations_and_noise(group, read_sets(group, factors), 0.5)
        activations = [a for stack in distinct for a in np.asarray(stack)]
        tangents = [g for stack in tangents for g in np.asarray(stack)]
        assert len(activations) <= len(tangents) == len(matrices)
        layers = [layer for layer in group.layers for _ in range(layer.count)]
        for matrix, read, tangent, layer in zip(matrices, group.reads, tangents, layers, strict=True):
            activation = activations[read]
            if not layer.direct:  # of a kernel with other uses this is a part of the gradient
                continue
            if layer.kind == Embedding():
                activation = np.eye(group.inputs)[activation[:, 0]]
            elif layer.bias is not None and not layer.unbiased:
                activation = np.concatenate([activation, layer.bias_inputs(len(activation))[:, None]], 1)
            np.testing.assert_allclose(
                activation.T @ tangent, matrix[: layer.inputs, : layer.outputs], rtol=1e-4, atol=1e-6
            )
            assert not matrix[layer.inputs :].any() and not matrix[:, layer.outputs :].any()


@pytest.mark.parametrize("name", ["equation", "one output"])
def test_biases_and_kernels_of_one_output_take_the_denoised_step(name):
    loss, params, batch = PROBLEMS[name]()
    structure = gmn_lopt.analyze(loss, params, *batch)
    assert gmn_lopt.explain(structure).startswith("21 of 21 entries: the denoised step")
    unbiased = {layer.unbiased for layer in structure.layers}
    assert unbiased == {()} if name == "one output" else all(unbiased)


def test_moments_of_a_bias_count_only_where_it_is_added():
    """Beside a literal mean of ``[a, 1][a, 1]^T``, with a zero for the one where a derivative passes."""
    loss, params, batch = differential_equation()
    structure = gmn_lopt.analyze(loss, params, *batch)
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *batch)
    tx = gmn_lopt.load("default", structure)
    _, state = tx.update(grads, tx.init(params), params, factors=factors)
    (preconditioner,), (group,) = state.direction.preconditioners, layer_groups(structure, range(4))
    for layer, found in zip(group.readers, np.asarray(preconditioner.activation)):
        of_layer = next(x for x in structure.layers if x.activation == layer.activation)
        a = np.asarray(factors.activations[layer.activation])
        one = np.ones(len(a))
        for start, stop in of_layer.unbiased:
            one[start:stop] = 0
        assert 0 < one.sum() < len(a)
        rows = np.concatenate([a, one[:, None]], axis=1)
        n = rows.shape[1]
        np.testing.assert_allclose(
            found.reshape(group.inputs, -1)[:n, :n], rows.T @ rows / len(a), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    "options",
    [{}, {"attention": transformers.fused, "feed": transformers.gated}, {"attention": transformers.per_head}],
    ids=["separate", "fused", "per head"],
)
def test_layers_that_are_scanned_over_take_the_steps_of_the_same_layers_one_by_one(options):
    (loss, apart, batch), (scanned, params, _) = (
        transformers.plain(scan=s, blocks=3, **options) for s in (False, True)
    )
    stack = lambda tree: tree | {"blocks": jax.tree.map(lambda *xs: jnp.stack(xs), *tree["blocks"])}  # noqa: E731
    assert relative_difference(stack(apart), params) == 0
    structure = gmn_lopt.analyze(scanned, params, *batch)
    names = [p.name for p in structure.parameters]
    groups = layer_groups(structure, range(len(names)))
    found = {names[i] for group in groups for i in group.places}
    left = {name for name in names if name not in found and "blocks" in name}
    assert left == {name for name in names if "norm" in name and "blocks" in name}

    def updates(loss, params):
        lopt = gmn_lopt.LearnedOptimizer(gmn_lopt.analyze(loss, params, *batch), gmn_lopt.Denoised())
        tx = lopt.optimizer(lopt.init(jax.random.key(0)))
        state = tx.init(params)
        for shrink in (1.0, 0.9, 0.7):
            moved = jax.tree.map(lambda x, s=shrink: s * x, params)
            _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(moved, *batch)
            result, state = tx.update(grads, state, moved, factors=factors)
        return result

    # Small singular values are those of rounding.
    assert relative_difference(updates(scanned, params), stack(updates(loss, apart))) < 3e-3


def test_layers_that_read_the_same_activations_share_what_is_known_of_them():
    loss, params, batch = transformers.plain(blocks=2)
    structure = gmn_lopt.analyze(loss, params, *batch)
    groups = layer_groups(structure, range(len(structure.parameters)))
    (group,) = [group for group in groups if group.tall and group.reads_neurons]
    # Of two blocks queries and values, which share their matrices, keys, which have no bias, and the layers above.
    assert group.reads == (0, 1, 0, 2, 3, 4, 3, 5)
    state = init_preconditioner(group)
    assert len(state.inverse) == len(state.activation) == 6 and len(state.root) == len(state.noise) == 8


def test_small_layers_of_about_one_size_are_one_stack_and_take_the_steps_that_they_take_alone(monkeypatch):
    """Of sides up to 128, and padded to at most twice their larger side, or to 64."""
    loss, params, batch = mlp(40, 30, 20, 90, 70, 200, 10)
    structure = gmn_lopt.analyze(loss, params, *batch)
    indices = range(len(structure.parameters))
    sizes = [[(x.inputs, x.outputs) for x in group.layers] for group in layer_groups(structure, indices)]
    assert sizes == [[(41, 30), (31, 20)], [(21, 90)], [(91, 70)], [(71, 200)], [(201, 10)]]

    def updates():
        tx = gmn_lopt.load("default", structure)
        state, results = tx.init(params), []
        for shrink in (1.0, 0.9, 0.7):
            moved = jax.tree.map(lambda x, s=shrink: s * x, params)
            _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(moved, *batch)
            result, state = tx.update(grads, state, moved, factors=factors)
            results.append(result)
        return results

    together = updates()
    monkeypatch.setattr(denoised_layers, "JOINED", 0)
    assert len(layer_groups(structure, indices)) == 6
    assert relative_difference(together, updates()) < 1e-4
