"""Gradients that are rescaled after the factors were computed, features of any size, sets that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from optimizing import mlp, record, relative_difference

import gmn_lopt
from gmn_lopt.factors.structure import StructureError
from gmn_lopt.optimizers.directions.common_factor import common_factor, comparisons
from gmn_lopt.optimizers.directions.denoised_layers import layer_groups
from gmn_lopt.optimizers.leaves import Gradient, factors_per_element

MODEL = mlp(6, 9, 4)
STRUCTURE = gmn_lopt.analyze(MODEL[0], MODEL[1], *MODEL[2])


def scaled(factors, by):
    return gmn_lopt.Factors(factors.activations, tuple(by * g for g in factors.tangents))


def updates(recorded, of_gradients, of_factors, structure=STRUCTURE):
    tx = gmn_lopt.load("default", structure)
    state, update, made = tx.init(recorded[0][0]), jax.jit(tx.update), []
    for (params, grads, factors), c, d in zip(recorded, of_gradients, of_factors):
        step, state = update(optax.tree.scale(c, grads), state, params, factors=scaled(factors, d))
        made.append(step)
    return made


@pytest.mark.parametrize("factor", [2.0**15, 1e-3, 1e12])
def test_a_loss_scale_on_gradients_or_factors_or_both_changes_nothing(factor):
    recorded = record(MODEL, steps=4)
    plain = updates(recorded, [1.0] * 4, [1.0] * 4)
    for gradients, factors in ((factor, 1.0), (1.0, factor), (factor, factor)):
        assert relative_difference(updates(recorded, [gradients] * 4, [factors] * 4), plain) < 2e-3


def test_clipping_the_gradient_is_clipping_the_factors():
    recorded = record(MODEL, steps=4)
    norms = [optax.tree.norm(grads) for _, grads, _ in recorded]
    clips = [jnp.minimum(1.0, 0.3 * min(norms) / norm * (1 + t)) for t, norm in enumerate(norms)]
    together, before = updates(recorded, clips, clips), updates(recorded, clips, [1.0] * 4)
    assert len({float(c) for c in clips}) > 1
    assert relative_difference(before, together) < 2e-3


@pytest.mark.parametrize("name", ["plain", "scanned"])
def test_the_factor_is_found_in_transformers(name):
    loss, params, batch = transformers.plain(scan=name == "scanned", blocks=2)
    structure = gmn_lopt.analyze(loss, params, *batch)
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *batch)

    def found(grads, factors=factors):
        indices = list(range(len(structure.parameters)))
        gradient = Gradient(structure, indices, grads, factors_per_element(structure, factors))
        return common_factor(comparisons(layer_groups(structure, indices), gradient))

    assert found(grads) == pytest.approx(1.0, rel=1e-3)
    assert found(jax.tree.map(lambda g: 77 * g, grads)) == pytest.approx(77.0, rel=1e-3)
    # What is no multiple of the gradient leaves the factors as they are.
    noise = jax.tree.map(lambda g: jax.random.normal(jax.random.key(0), g.shape), grads)
    assert found(noise) == 1.0
    assert found(jax.tree.map(jnp.zeros_like, grads)) == 1.0


def features(size, steps=4, name="default", **settings):
    """Updates of a network whose features are multiplied by a number, and whose first kernel is divided by it."""
    loss, params, (x, labels) = MODEL
    params = [params[0] | {"w": params[0]["w"] / size}, params[1]]
    tx = gmn_lopt.load(name, STRUCTURE, **settings)
    state, made = tx.init(params), []
    update = jax.jit(lambda g, s, p, f: tx.update(g, s, p, factors=f))
    for step in range(steps):
        noisy = (x + 0.3 * jax.random.normal(jax.random.key(step), x.shape)) * size
        _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, noisy, labels)
        step, state = update(grads, state, params, factors)
        made.append(step)
    return made


def test_features_whose_squares_are_not_finite_are_like_others():
    # The feedback on the step size takes gradients whose squares are not finite for ones without a direction.
    huge, large = (features(size, learning_rate=0.05) for size in (1e20, 1e10))
    assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(huge))
    by = lambda made, size: [size * step[0]["w"] for step in made]  # noqa: E731
    np.testing.assert_allclose(by(huge, 1e20), by(large, 1e10), rtol=2e-3, atol=2e-3 * np.abs(by(large, 1e10)).max())
    np.testing.assert_allclose([s[1]["w"] for s in huge], [s[1]["w"] for s in large], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["default", "default+celo", "default+gmn", "cifar10_mlp-ds", "cifar10_mlp-ds+gmn"])
def test_with_their_own_step_sizes_too_steps_are_finite_and_kernels_move(name):
    for step in features(1e20, name=name):
        assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(step))
        assert all(jnp.abs(layer["w"]).max() > 0 for layer in step)


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
@pytest.mark.parametrize("first", [True, False])
def test_a_set_that_is_not_finite_is_left_out(bad, first):
    recorded = record(MODEL, steps=3)
    tx = gmn_lopt.load("default", STRUCTURE)
    state, params = tx.init(recorded[0][0]), recorded[0][0]
    for t, (_, grads, factors) in enumerate(recorded):
        if (t == 0) == first:
            factors = jax.tree.map(lambda x: x.at[0, 0].set(bad), factors)
        step, state = tx.update(grads, state, params, factors=factors)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((step, state)))


@pytest.mark.parametrize("name", ["default", "default+celo", "default+gmn", "cifar10_mlp-ds", "cifar10_mlp-ds+gmn"])
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_parameters_without_entries(name, shape):
    loss, params, batch = mlp(6, 9, 4, batch=32)
    params = {"net": params, "none": jnp.zeros(shape)}
    with_none = lambda p, *args: loss(p["net"], *args) + jnp.sum(p["none"])  # noqa: E731
    tx = gmn_lopt.load(name, gmn_lopt.analyze(with_none, params, *batch))
    state = tx.init(params)
    for _ in range(2):
        _, grads, factors = gmn_lopt.value_grad_and_factors(with_none)(params, *batch)
        step, state = tx.update(grads, state, params, factors=factors)
    assert step["none"].shape == shape
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(step))


def test_an_empty_batch_is_refused_in_one_line():
    loss, params, (x, labels) = MODEL
    for call in (gmn_lopt.analyze, lambda loss, *args: gmn_lopt.value_grad_and_factors(loss)(*args)):
        with pytest.raises(StructureError, match="no element") as error:
            call(loss, params, x[:0], labels[:0])
        assert "\n" not in str(error.value)
