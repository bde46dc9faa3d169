"""Base directions, orthogonalisation and whitening, against NumPy's decompositions and optax's Muon."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizing import analyzed, mlp, play, record, residual

import gmn_lopt
from gmn_lopt.learned_optimizer import LearnedOptimizer
from gmn_lopt.matrices import is_kernel, orthogonalize
from gmn_lopt.whitening import DAMPING, DECAY, whitened_layers, whitened_steps

MODEL = mlp(6, 9, 4)
STRUCTURE = analyzed(MODEL)


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
    lopt = LearnedOptimizer(STRUCTURE, "sgdm", base="muon")
    phi = lopt.init(jax.random.key(0))
    step = play(lopt, phi, recorded)[-1]
    weights = 0.05 * np.array([0.95**3, 0.95**2, 0.95 + 1])
    gradients = np.stack([np.asarray(grads[0]["w"], np.float64) for _, grads, _ in recorded])
    turned = in_singular_basis(np.tensordot(weights, gradients, 1), -step[0]["w"] / jnp.exp(phi["log_alpha"]))
    assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-2
    assert np.all((np.diag(turned) / np.sqrt(9 / 6) > 0.4) & (np.diag(turned) / np.sqrt(9 / 6) < 1.3))
    gradients = np.stack([np.asarray(grads[0]["b"], np.float64) for _, grads, _ in recorded])
    squares = (np.array([0.999**2, 0.999, 1.0]) * 0.001) @ gradients**2 / (1 - 0.999**3)
    expected = -np.exp(float(phi["log_alpha"] + phi["log_gamma"])) * weights @ gradients / (1 - 0.95**4)
    np.testing.assert_allclose(step[0]["b"], expected / (np.sqrt(squares) + 1e-8), rtol=1e-4)


def test_whitened_steps_are_orthogonal_where_activations_are_white():
    recorded = record(MODEL)
    lopt = LearnedOptimizer(STRUCTURE, "sgdm", gradmetanet=None, base="whitened")
    assert lopt.needs_factors
    phi = lopt.init(jax.random.key(0))
    step = play(lopt, phi, recorded)[-1]
    layers = whitened_layers(STRUCTURE, range(len(STRUCTURE.parameters)))
    assert len(layers) == 2 and all(layer.bias is not None for layer in layers)
    for i, layer in enumerate(layers):
        activations = [np.asarray(factors.activations[layer.activation], np.float64) for _, _, factors in recorded]
        activations = [np.concatenate([a, np.ones((len(a), 1))], 1) for a in activations]
        weights = (1 - DECAY) * DECAY ** np.arange(3)[::-1] / (1 - DECAY**3)
        covariance = sum(w * a.T @ a / len(a) for w, a in zip(weights, activations))
        damped = covariance + DAMPING * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        root = np.linalg.cholesky(damped)
        gradients = [np.concatenate([grads[i]["w"], grads[i]["b"][None]]) for _, grads, _ in recorded]
        momentum = sum(0.1 * 0.9 ** (2 - t) * g.astype(np.float64) for t, g in enumerate(gradients))
        white = np.linalg.solve(root, momentum)
        full = -np.concatenate([step[i]["w"], step[i]["b"][None]]).astype(np.float64) / np.exp(float(phi["log_alpha"]))
        turned = in_singular_basis(white, root.T @ full)
        # The tangents of a softmax sum to zero: the last layer's momentum lacks one singular value.
        rank = np.linalg.matrix_rank(white, tol=1e-4 * np.linalg.norm(white))
        turned = turned[:rank, :rank] / np.diag(turned)[:rank].mean()
        # Newton-Schulz leaves singular values between about 0.7 and 1.2, and vectors as they are.
        assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-2
        assert np.all((np.diag(turned) > 0.4) & (np.diag(turned) < 1.6))
        change = np.sum(full * (covariance @ full)) / full.shape[1]
        assert change == pytest.approx(1.0, rel=1e-3)


def test_a_kernel_that_two_layers_use_is_left_to_muon():
    params = {"w": jnp.eye(5) + 0.1, "out": jnp.ones((5, 2))}
    x = jax.random.normal(jax.random.key(0), (12, 5))

    def loss(params, x):
        return jnp.mean((jnp.tanh(jnp.tanh(x @ params["w"]) @ params["w"]) @ params["out"]) ** 2)

    model = (loss, params, (x,))
    structure = analyzed(model)
    found = [structure.parameters[layer.kernel].name for layer in whitened_layers(structure, range(2))]
    assert found == ["['out']"]
    recorded = record(model)
    whitened, muon = (LearnedOptimizer(structure, "sgdm", base=base) for base in ("whitened", "muon"))
    phi = muon.init(jax.random.key(0))
    updates = play(whitened, phi, recorded[:1])[0], play(muon, phi, recorded[:1])[0]
    np.testing.assert_allclose(updates[0]["w"], updates[1]["w"], rtol=1e-3, atol=1e-6)


def test_a_layer_of_which_a_part_is_masked_is_left_to_muon():
    indices = [i for i, p in enumerate(STRUCTURE.parameters) if p.name != "[0]['b']"]
    assert len(whitened_layers(STRUCTURE, indices)) == 1


def test_units_that_are_all_dead_do_not_break_the_step():
    loss, params, args = MODEL
    params = [params[0] | {"b": params[0]["b"] - 100.0}, params[1]]
    for base in ("muon", "whitened"):
        lopt = LearnedOptimizer(STRUCTURE, "sgdm", base=base)
        tx = lopt.optimizer(lopt.init(jax.random.key(0)))
        _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *args)
        updates, _ = tx.update(grads, tx.init(params), params, factors=factors)
        assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))


def literal_whitened_step(momentum, covariance):
    """``L^-T NewtonSchulz(L^-1 M)``, scaled to change the outputs by a root mean square of one; in float64."""
    damped = covariance + DAMPING * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    root = np.linalg.cholesky(damped)
    x = np.linalg.solve(root, momentum)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    step = np.linalg.solve(root.T, x)
    return step / np.sqrt(np.sum(step * (covariance @ step)) / step.shape[1])


@pytest.mark.parametrize("inputs, outputs", [(12, 5), (5, 12), (8, 7)])
@pytest.mark.parametrize("size", [1.0, 1e-15])
def test_whitened_step_is_the_iteration_on_the_whitened_momentum(inputs, outputs, size):
    parameters, layer = whitened_layer(inputs, outputs)
    random = np.random.default_rng(0)
    activations = random.normal(size=(40, inputs + 1)) * np.exp(random.normal(size=inputs + 1))
    covariance = activations.T @ activations / 40
    momentum = random.normal(size=(inputs + 1, outputs))

    def step(momentum):
        parts = dict(whitened_steps(layer, parameters, [momentum[:-1], momentum[-1]], jnp.float32(covariance)))
        return jnp.concatenate([parts[0], parts[1][None]])

    given = jnp.float32(momentum)
    np.testing.assert_allclose(step(size * given), literal_whitened_step(momentum, covariance), rtol=2e-3, atol=2e-4)
    # Its derivative, too, in a random direction; and for several models at once.
    towards, weights = random.normal(size=(2, *momentum.shape))
    ends = [literal_whitened_step(momentum + h * towards, covariance) for h in (1e-5, -1e-5)]
    slope = np.sum(weights * (ends[0] - ends[1])) / 2e-5
    gradient = jax.grad(lambda m: jnp.sum(weights * step(m)))(given)
    assert np.sum(gradient * towards) == pytest.approx(slope, rel=1e-2, abs=1e-2)
    many = jnp.stack([given, jnp.float32(towards)])
    np.testing.assert_allclose(jax.vmap(step)(many)[1], step(many[1]), rtol=1e-5, atol=1e-6)


def test_whitened_step_of_no_momentum_is_none():
    parameters, layer = whitened_layer(3, 4)
    steps = whitened_steps(layer, parameters, [jnp.zeros((3, 4)), jnp.zeros(4)], jnp.zeros((4, 4)))
    assert all((step == 0).all() for _, step in steps)


def whitened_layer(inputs, outputs):
    def loss(params, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x) @ params["w"] + params["b"]) ** 2)

    params = {"w": jnp.ones((inputs, outputs)), "b": jnp.ones(outputs)}
    structure = gmn_lopt.analyze(loss, params, jnp.ones((6, inputs)))
    (layer,) = whitened_layers(structure, range(2))
    kernel_first = [structure.parameters[i] for i in (layer.kernel, layer.bias)]
    return kernel_first, replace(layer, kernel=0, bias=1)
