"""Which kernels write a residual stream, and the step that they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import gmn_lopt
from gmn_lopt.optimizers.directions import spreading
from gmn_lopt.optimizers.directions.denoised_layers import layer_groups, residual_kernels
from gmn_lopt.optimizers.directions.preconditioners import DAMPING, FLOOR, TANGENT_DAMPING


def draw(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) / shape[0] ** 0.5 for key, shape in zip(keys, shapes)]


def residual(inputs, width, hidden):
    """A stream of one block, between an input and an output layer."""

    def loss(w, x, y):
        stream = x @ w[0]
        stream = stream + jnp.tanh(stream @ w[1]) @ w[2]
        return jnp.mean((stream @ w[3] - y) ** 2)

    x, y = jax.random.normal(jax.random.key(1), (64, inputs)), jax.random.normal(jax.random.key(2), (64, 7))
    return loss, draw((inputs, width), (width, hidden), (hidden, width), (width, 7)), (x, y)


def names_of_writers(loss, params, batch):
    structure = gmn_lopt.analyze(loss, params, *batch)
    return sorted(structure.parameters[i].name for i in residual_kernels(structure))


@pytest.mark.parametrize("scan", [False, True])
def test_writers_of_a_transformer_are_embeddings_attention_outputs_and_second_layers(scan):
    loss, params, batch = transformers.plain(blocks=2, scan=scan)
    structure = gmn_lopt.analyze(loss, params, *batch)
    written = {structure.parameters[i].name for i in residual_kernels(structure)}
    assert any("blocks" in name for name in written)
    assert not any(part in name for name in written for part in ("'q'", "'k'", "'v'", "norm", "head"))
    assert any("'o'" in name for name in written)


def two_of_one_sum(w, x, y):
    return jnp.mean(jnp.tanh(x @ w[0] + y @ w[1]) @ w[2])


def recurrent(w, x):
    def step(state, x):
        state = jnp.tanh(state @ w[0] + x @ w[1])
        return state, state @ w[2]

    return jnp.mean(jax.lax.scan(step, jnp.zeros((4, 5)), x)[1] ** 2)


@pytest.mark.parametrize(
    "loss, shapes, batch",
    [
        (lambda w, x: jnp.mean(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) @ w[2]), [(3, 4), (4, 4), (4, 2)], [(8, 3)]),
        (two_of_one_sum, [(3, 5), (4, 5), (5, 2)], [(8, 3), (8, 4)]),
        (recurrent, [(5, 5), (3, 5), (5, 2)], [(6, 4, 3)]),
    ],
    ids=["perceptron", "two maps into one sum", "recurrent"],
)
def test_what_is_no_residual_stream(loss, shapes, batch):
    assert names_of_writers(loss, draw(*shapes), draw(*batch)) == []


def literal_step(momentum, covariance, tangents):
    """``L^-T orth(X) K^-1`` of ``X = L^-1 M K^-T``, changing the outputs by a root mean square of one; in float64.

    Of singular values ``s`` that are not far above the floor ``r``, ``s / sqrt(s^2 + r)`` is left.
    """
    damped = [
        x + damping * np.trace(x) / len(x) * np.eye(len(x))
        for x, damping in ((covariance, DAMPING), (tangents, TANGENT_DAMPING))
    ]
    left, right = (np.linalg.cholesky(x) for x in damped)
    u, s, v = np.linalg.svd(np.linalg.solve(left, momentum) @ np.linalg.inv(right).T, full_matrices=False)
    step = np.linalg.solve(left.T, u * s / np.sqrt(s**2 + FLOOR * np.mean(s**2)) @ v) @ np.linalg.inv(right)
    return step / np.sqrt(np.sum(step * (covariance @ step)) / step.shape[1])


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("sizes", [(9, 6, 12), (5, 8, 6)], ids=["tall", "wide"])
def test_writers_take_orthogonal_steps_where_activations_and_tangents_are_white(sizes, large, monkeypatch):
    if large:
        monkeypatch.setattr(spreading, "SPREAD", 0.0)
    loss, params, batch = residual(*sizes)
    structure = gmn_lopt.analyze(loss, params, *batch)
    writers = {layer.kernel: layer for layer in structure.layers if layer.kernel in residual_kernels(structure)}
    assert sorted(writers) == [0, 2]
    groups = layer_groups(structure, range(4))
    assert {layer.kernel: group.residual for group in groups for layer in group.layers} == {
        0: True, 1: False, 2: True, 3: False,
    }  # fmt: skip
    lopt = gmn_lopt.LearnedOptimizer(structure, gmn_lopt.Denoised())
    phi = lopt.init(jax.random.key(0))
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *batch)
    tx = lopt.optimizer(phi, learning_rate=1.0)
    updates, state = tx.update(grads, tx.init(params), params, factors=factors)
    for i, layer in writers.items():
        a = np.asarray(factors.activations[layer.activation], np.float64)
        g = np.asarray(factors.tangents[layer.tangent], np.float64)
        np.testing.assert_allclose(a.T @ g, grads[i], rtol=1e-3, atol=1e-6)
        expected = literal_step(a.T @ g, a.T @ a / len(a), g.T @ g)
        assert np.abs(-updates[i] - expected).max() < 0.04 * np.abs(expected).max()
    kept = [p for p in state.direction.preconditioners if p.tangents is not None]
    assert bool(kept) == (sizes[0] < sizes[1] or sizes[2] < sizes[1])
