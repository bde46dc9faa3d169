"""Directions, orthogonalisation and denoising, against NumPy's decompositions and optax's Muon."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from optimizing import analyzed, mlp, play, record, residual

import gmn_lopt
from gmn_lopt import Denoised, LearnedOptimizer, Muon
from gmn_lopt.factors import Embedding
from gmn_lopt.factors.matrices import is_kernel, orthogonalize
from gmn_lopt.factors.structure import Factors
from gmn_lopt.optimizers.directions.denoised_layers import layer_groups
from gmn_lopt.optimizers.directions.denoising import denoised_steps, update_preconditioners
from gmn_lopt.optimizers.directions.preconditioners import (
    DAMPING,
    MOMENTS_DECAY,
    MOMENTUM_DECAY,
    init_preconditioner,
)
from gmn_lopt.optimizers.directions.spreading import EARLY, EVERY

MODEL = mlp(6, 9, 4)
STRUCTURE = analyzed(MODEL)


def alpha(phi):
    return float(jnp.exp(phi["step_size"]["log_alpha"]))


def in_singular_basis(matrix, result):
    """``result`` in the basis of the singular vectors of ``matrix``."""
    u, _, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u.T @ np.asarray(result, np.float64) @ vt.T


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e6])
def test_orthogonalized_kernels_keep_their_singular_vectors(scale):
    for parameter in STRUCTURE.parameters:
        if not is_kernel(parameter):
            continue
        value = scale * np.random.default_rng(0).normal(size=parameter.shape)
        result = orthogonalize(parameter, jnp.asarray(value, jnp.float32))
        turned = in_singular_basis(value, result) / np.sqrt(max(1, parameter.shape[1] / parameter.shape[0]))
        assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-3
        assert np.all((np.diag(turned) > 0.4) & (np.diag(turned) < 1.3))


def test_kernels_of_many_axes_are_stacks_of_matrices():
    structure = analyzed(residual())
    (blocks,) = [p for p in structure.parameters if "blocks" in p.name]
    value = np.random.default_rng(0).normal(size=blocks.shape)
    result = orthogonalize(blocks, jnp.asarray(value, jnp.float32))
    assert result.shape == blocks.shape
    flat = in_singular_basis(value.reshape(8, 7), np.asarray(result).reshape(8, 7))
    assert np.abs(flat - np.diag(np.diag(flat))).max() < 1e-3


def test_muon_orthogonalizes_nesterov_momentum_and_takes_adam_s_direction_elsewhere():
    recorded = record(MODEL)
    lopt = LearnedOptimizer(STRUCTURE, Muon())
    phi = lopt.init(jax.random.key(0))
    step = play(lopt, phi, recorded)[-1]
    weights = 0.05 * np.array([0.95**3, 0.95**2, 0.95 + 1])
    gradients = np.stack([np.asarray(grads[0]["w"], np.float64) for _, grads, _ in recorded])
    turned = in_singular_basis(np.tensordot(weights, gradients, 1), -step[0]["w"] / alpha(phi))
    assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-2
    assert np.all((np.diag(turned) / np.sqrt(9 / 6) > 0.4) & (np.diag(turned) / np.sqrt(9 / 6) < 1.3))
    gradients = np.stack([np.asarray(grads[0]["b"], np.float64) for _, grads, _ in recorded])
    squares = (np.array([0.999**2, 0.999, 1.0]) * 0.001) @ gradients**2 / (1 - 0.999**3)
    expected = -alpha(phi) * 0.3 * weights @ gradients / (1 - 0.95**4)
    np.testing.assert_allclose(step[0]["b"], expected / (np.sqrt(squares) + 1e-8), rtol=1e-4)


def in_blocks(group, covariance):
    """The second moment of activations without what is outside of the blocks on its diagonal."""
    block = np.arange(len(covariance)) // group.rows
    return np.where(block[:, None] == block, covariance, 0.0)


def literal_step(momentum, covariance, noise):
    """``L^-T X (X^T X + N)^-1/2`` of ``X = L^-1 M``, changing the outputs by a root mean square of one; in float64.

    A number for the noise is what is added to ``X X^T`` in place of ``X^T X``.
    """
    damped = covariance + DAMPING * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    root = np.linalg.cholesky(damped)
    x = np.linalg.solve(root, momentum)
    values, vectors = np.linalg.eigh(x.T @ x + noise if np.ndim(noise) else x @ x.T + noise * np.eye(len(x)))
    inverse = vectors * np.maximum(values, 1e-12 * values.max()) ** -0.5 @ vectors.T
    step = np.linalg.solve(root.T, x @ inverse if np.ndim(noise) else inverse @ x)
    return step / np.sqrt(np.sum(step * (covariance @ step)) / step.shape[1])


@pytest.mark.parametrize("widths", [(6, 9, 4), (9, 6, 4), (6, 6, 6, 4)], ids=["wide", "narrow", "two alike"])
def test_denoised_steps_are_those_of_the_moments_of_the_set(widths):
    model = mlp(*widths)
    structure, recorded = analyzed(model), record(model)
    lopt = LearnedOptimizer(structure, Denoised())
    assert lopt.needs_factors
    phi = lopt.init(jax.random.key(0))
    step = play(lopt, phi, recorded)[-1]
    groups = layer_groups(structure, range(len(structure.parameters)))
    assert all(x.bias is not None and x.tall == group.tall for group in groups for x in group.layers)
    pairs = [(group, layer) for group in groups for layer in group.layers]
    assert len(pairs) == len(widths) - 1
    weights = [(1 - d) * d ** np.arange(3)[::-1] / (1 - d**3) for d in (MOMENTS_DECAY, MOMENTUM_DECAY)]
    for group, layer in pairs:
        i = layer.kernel // 2
        activations = [np.asarray(factors.activations[layer.activation], np.float64) for _, _, factors in recorded]
        activations = [np.concatenate([a, np.ones((len(a), 1))], 1) for a in activations]
        # Of the batch's loss: their sum over the set, with the activations, is the gradient.
        tangents = [np.asarray(factors.tangents[layer.tangent], np.float64) for _, _, factors in recorded]
        gradients = [a.T @ g for a, g in zip(activations, tangents)]
        np.testing.assert_allclose(gradients[-1][:-1], recorded[-1][1][i]["w"], rtol=1e-4, atol=1e-6)
        covariance = in_blocks(group, sum(w * a.T @ a / len(a) for w, a in zip(weights[0], activations)))
        momentum = sum(w * g for w, g in zip(weights[1], gradients))
        noise = sum(weights[1] ** 2) * sum(w * g.T @ g for w, g in zip(weights[0], tangents))
        noise = len(covariance) * noise if layer.tall else np.trace(noise)
        full = -np.concatenate([step[i]["w"], step[i]["b"][None]]).astype(np.float64) / np.exp(
            float(phi["step_size"]["log_alpha"])
        )
        expected = literal_step(momentum, covariance, noise)
        assert np.abs(full - expected).max() < 0.02 * np.abs(expected).max()


def test_noise_is_the_variance_of_a_sum_over_the_set():
    """The two formulas for the noise, against many sets of independent activations and tangents of mean zero."""
    random = np.random.default_rng(0)
    mix_in, mix_out = random.normal(size=(5, 5)), random.normal(size=(3, 3))
    activations, tangents = random.normal(size=(4000, 16, 5)) @ mix_in, random.normal(size=(4000, 16, 3)) @ mix_out
    gradients = np.einsum("nsi,nso->nio", activations, tangents)
    white = np.linalg.solve(np.linalg.cholesky(mix_in.T @ mix_in), gradients)
    tangent_moment = np.einsum("nso,nsp->op", tangents, tangents) / 4000
    right, left = np.einsum("nio,nip->op", white, white) / 4000, np.einsum("nio,njo->ij", white, white) / 4000
    np.testing.assert_allclose(right, 5 * tangent_moment, atol=0.05 * np.trace(right))
    np.testing.assert_allclose(left, np.trace(tangent_moment) * np.eye(5), atol=0.05 * np.trace(left) / 5)


def test_a_table_of_embeddings_is_denoised_by_how_often_each_token_occurs():
    tokens = jnp.array([[0, 1, 1, 3], [1, 3, 1, 1]])
    params = {
        "table": jax.random.normal(jax.random.key(0), (5, 3)),
        "out": jax.random.normal(jax.random.key(1), (3, 2)),
    }

    def loss(params, tokens):
        return jnp.mean((params["table"][tokens] @ params["out"] - 1.0) ** 2)

    structure = analyzed((loss, params, (tokens,)))
    (table,) = [group.layers[0] for group in layer_groups(structure, range(2)) if group.layers[0].kind == Embedding()]
    lopt = LearnedOptimizer(structure, Denoised())
    phi = lopt.init(jax.random.key(0))
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, tokens)
    tx = lopt.optimizer(phi)
    updates, state = tx.update(grads, tx.init(params), params, factors=factors)
    one_hot = np.eye(5)[np.asarray(tokens).reshape(-1)]
    covariance, tangents = one_hot.T @ one_hot / 8, np.asarray(factors.tangents[table.tangent], np.float64)
    expected = literal_step(np.asarray(grads["table"], np.float64), covariance, 5 * tangents.T @ tangents)
    np.testing.assert_allclose(-updates["table"] / alpha(phi), expected, rtol=0.02, atol=1e-3)
    assert (updates["table"][jnp.array([2, 4])] == 0).all()  # tokens that have not occurred
    # The state is as large as the table, and a number for each token, not for each pair of them.
    assert max(x.size for x in jax.tree.leaves(state)) == params["table"].size


def test_a_table_that_is_an_output_layer_too_is_treated_as_that():
    params = {"table": jax.random.normal(jax.random.key(1), (7, 5)), "w": jnp.eye(5) + 0.1}

    def loss(params, ids):
        logits = jnp.tanh(params["table"][ids] @ params["w"]) @ params["table"].T
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    structure = gmn_lopt.analyze(loss, params, jnp.arange(7))
    groups = layer_groups(structure, range(2))
    names = {structure.parameters[layer.kernel].name: group for group in groups for layer in group.layers}
    assert set(names) == {"['table']", "['w']"}
    assert (names["['table']"].inputs, names["['table']"].outputs) == (5, 7)


def test_a_layer_of_which_a_part_is_masked_is_left_to_muon():
    indices = [i for i, p in enumerate(STRUCTURE.parameters) if p.name != "[0]['b']"]
    (group,) = layer_groups(STRUCTURE, indices)
    assert len(group.layers) == 1


def test_the_alias_is_the_direction_with_a_learning_rate_and_weight_decay():
    (params, grads, factors), *_ = record(MODEL, steps=1)
    lopt = LearnedOptimizer(STRUCTURE, Denoised())
    reference = lopt.optimizer(lopt.init(jax.random.key(0)))  # of step size 0.1
    expected, _ = reference.update(grads, reference.init(params), params, factors=factors)
    schedule = optax.constant_schedule(0.02)
    tx = gmn_lopt.denoised(STRUCTURE, schedule, weight_decay=0.5)
    found, _ = tx.update(grads, tx.init(params), params, factors=factors)
    scaled = jax.tree.map(lambda u, p: 0.2 * u - 0.02 * 0.5 * p, expected, params)
    chex.assert_trees_all_close(found, scaled, rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match="value_grad_and_factors"):
        tx.update(grads, tx.init(params), params)


def test_units_that_are_all_dead_do_not_break_the_step():
    loss, params, args = MODEL
    params = [params[0] | {"b": params[0]["b"] - 100.0}, params[1]]
    for direction in (Muon(), Denoised()):
        lopt = LearnedOptimizer(STRUCTURE, direction)
        tx = lopt.optimizer(lopt.init(jax.random.key(0)))
        _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *args)
        updates, _ = tx.update(grads, tx.init(params), params, factors=factors)
        assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("inputs, outputs", [(12, 5), (5, 12), (8, 7)])
@pytest.mark.parametrize("size", [1.0, 1e-15])
def test_denoised_step_of_one_set_is_the_literal_form(inputs, outputs, size):
    group, factors, momentum, covariance, noise = one_set(inputs, outputs)
    factors = Factors(factors.activations, tuple(size * g for g in factors.tangents))

    def step(momentum):
        start = init_preconditioner(group)
        new = updated(start, group, factors, size * momentum)
        return denoised_step(group, new, size * momentum)

    np.testing.assert_allclose(step(momentum), literal_step(momentum, covariance, noise), rtol=0.02, atol=4e-3)
    towards = jax.random.normal(jax.random.key(1), momentum.shape)
    many = jnp.stack([momentum, towards])
    np.testing.assert_allclose(jax.vmap(step)(many)[1], step(towards), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_activations_of_any_size_are_whitened(scale):
    group, factors, momentum, _, _ = one_set(8, 7)
    group = replace(group, rows=8, layers=(replace(group.layers[0], bias=None),))

    def step(factor):
        scaled = Factors(tuple(factor * a for a in factors.activations), factors.tangents)
        start = init_preconditioner(group)
        return factor * denoised_step(group, updated(start, group, scaled, factor * momentum[:-1]), momentum[:-1])

    np.testing.assert_allclose(step(scale), step(1.0), rtol=1e-3, atol=1e-4)


def test_derivatives_take_the_preconditioner_for_a_constant():
    group, factors, momentum, _, _ = one_set(6, 4)
    towards, weights = jax.random.normal(jax.random.key(1), (2, *momentum.shape))
    start = init_preconditioner(group)
    new = updated(start, group, factors, momentum)

    def through(momentum):
        return jnp.sum(weights * denoised_step(group, updated(start, group, factors, momentum), momentum))

    found = jnp.sum(jax.grad(through)(momentum) * towards)
    ends = [jnp.sum(weights * denoised_step(group, new, momentum + h * towards)) for h in (1e-3, -1e-3)]
    assert found == pytest.approx(float(ends[0] - ends[1]) / 2e-3, rel=1e-2)


def test_preconditioner_is_new_in_the_first_steps_and_now_and_then_after_them():
    group, factors, momentum, _, _ = one_set(6, 4)
    rng, state = np.random.default_rng(0), init_preconditioner(group)
    update = jax.jit(lambda state, factors, step: updated(state, group, factors, momentum, step))
    seen, sets = [], []
    for t in range(23):
        noisy = jax.tree.map(lambda x: x * jnp.float32(rng.uniform(0.5, 2.0, x.shape)), factors)
        new = update(state, noisy, jnp.int32(t))
        if not np.array_equal(new.root, state.root):
            seen.append(t)
            sets.append(np.concatenate([noisy.activations[0], np.ones((40, 1))], 1).astype(np.float64))
        state = new
    assert seen == [t for t in range(23) if t < EARLY or t % EVERY == 0]
    weights = MOMENTS_DECAY ** np.arange(len(sets))[::-1]
    dense = lambda blocks: scipy.linalg.block_diag(*blocks)[:7, :7]  # noqa: E731
    expected = in_blocks(group, sum(w * a.T @ a / 40 for w, a in zip(weights / weights.sum(), sets)))
    np.testing.assert_allclose(dense(state.activation[0]), expected, rtol=1e-4)
    damped = expected + DAMPING * np.trace(expected) / 7 * np.eye(7)
    np.testing.assert_allclose(dense(state.inverse[0]) @ damped / state.scale[0] ** 2, np.eye(7), atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_denoised_step_of_no_momentum_is_none(noise):
    group, factors, momentum, _, _ = one_set(3, 4)
    factors = Factors(factors.activations, tuple(noise * g for g in factors.tangents))
    new = updated(init_preconditioner(group), group, factors, 0 * momentum)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(new))
    assert (denoised_step(group, new, 0 * momentum) == 0).all()


def updated(preconditioner, group, factors, momentum, step=0):
    """The preconditioner of a group of one layer after a step."""
    sets = factors.activations, factors.tangents
    return update_preconditioners((preconditioner,), (group,), (sets,), (momentum[None],), jnp.int32(step))[0]


def denoised_step(group, preconditioner, momentum):
    """The step of a group of one layer."""
    return denoised_steps([group], [preconditioner], [momentum[None]])[0][0]


def one_set(inputs, outputs):
    """A layer with a bias, factors of 40 elements, a momentum, and the moments that the literal form takes."""

    def loss(params, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x) @ params["w"] + params["b"]) ** 2)

    params = {"w": jnp.ones((inputs, outputs)), "b": jnp.ones(outputs)}
    (group,) = layer_groups(gmn_lopt.analyze(loss, params, jnp.ones((40, inputs))), range(2))
    random = np.random.default_rng(0)
    activation = random.normal(size=(40, inputs)) * np.exp(random.normal(size=inputs))
    tangent = random.normal(size=(40, outputs)) @ random.normal(size=(outputs, outputs))
    ones = np.concatenate([activation, np.ones((40, 1))], 1)
    noise = tangent.T @ tangent / 40**2
    noise = (inputs + 1) * noise if group.outputs <= group.inputs else np.trace(noise)
    factors = Factors((jnp.float32(activation),), (jnp.float32(tangent),))
    momentum = jnp.float32(random.normal(size=(inputs + 1, outputs)))
    (layer,) = group.layers
    return (
        replace(group, layers=(replace(layer, activation=0, tangent=0),)),
        factors,
        momentum,
        in_blocks(group, ones.T @ ones / 40),
        noise,
    )
