"""The rules, and features that know no scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizing import analyzed, common, lively, mlp, play, record, relative_difference, small, with_coefficients

from gmn_lopt import (
    UNF,
    Additive,
    Constant,
    Denoised,
    Feedback,
    GradMetaNetConfig,
    LearnedOptimizer,
    Momentum,
    Muon,
    Normalized,
    PaperFeatures,
    PointwiseMLP,
    PowerLaw,
    Residual,
    ScaleFree,
    SetReader,
)

MODEL = mlp(6, 9, 4)
STRUCTURE = analyzed(MODEL)
RECORDED = record(MODEL)


def make(direction=None, rule=None, step_size=None, features=None):
    residual = small(features or ScaleFree())
    lopt = LearnedOptimizer(STRUCTURE, direction or Momentum(), residual, rule or Additive(), step_size or Constant())
    return lopt, lively(lopt)


def rms(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


@pytest.mark.parametrize("features", [PaperFeatures(), ScaleFree()])
def test_normalized_steps_have_the_size_of_the_step_size(features):
    lopt, phi = make(rule=Normalized(), step_size=Constant(0.01), features=features)
    for update in play(lopt, phi, RECORDED):
        assert all(rms(u) == pytest.approx(0.01, rel=1e-4) for u in jax.tree.leaves(update))


def test_normalized_steps_do_not_depend_on_the_scale_of_the_loss():
    lopt, phi = make(rule=Normalized())
    smaller = [(p, jax.tree.map(lambda g: 1e-5 * g, grads), f) for p, grads, f in RECORDED]
    assert relative_difference(play(lopt, phi, smaller)[-1], play(lopt, phi, RECORDED)[-1]) < 1e-3


@pytest.mark.parametrize("scale", [0.0, 1e-18, 1e12])
def test_scale_free_features_are_finite_at_any_scale(scale):
    for shape in ((5, 4), (4,)):
        gradient = scale * jax.random.normal(jax.random.key(0), shape)
        averages = ScaleFree().advance(jnp.zeros((4, *shape)), gradient)
        features = ScaleFree().of_entries(jnp.zeros(shape), gradient, averages, jnp.int32(0))
        assert jnp.isfinite(features).all() and jnp.abs(features).max() < 10


@pytest.mark.parametrize("rule", [Additive(), Normalized()])
def test_learning_rate_schedule_and_weight_decay_enter_as_in_adamw(rule):
    lopt, phi = make(rule=rule, step_size=Constant(0.01))
    params, grads, _ = RECORDED[0]

    def first(**settings):
        tx = lopt.optimizer(phi, **settings)
        return tx.update(grads, tx.init(params), params)[0]

    plain = first()
    assert (
        relative_difference(first(learning_rate=lambda step: 0.05 + step), jax.tree.map(lambda u: 5 * u, plain)) < 1e-5
    )
    decayed = jax.tree.map(lambda u, p: u - 0.01 * 0.1 * p, plain, params)
    assert relative_difference(first(weight_decay=0.1), decayed) < 1e-5


@pytest.mark.parametrize(
    ("direction", "rule"), [(Momentum(), Additive()), (Muon(), Additive()), (Muon(), Normalized())]
)
def test_a_network_without_output_leaves_the_direction(direction, rule):
    lopt = LearnedOptimizer(STRUCTURE, direction, small(output_scale=0.0), rule)
    phi = lopt.init(jax.random.key(0))
    louder = with_coefficients(phi, beta=100.0)
    assert relative_difference(play(lopt, louder, RECORDED)[-1], play(lopt, phi, RECORDED)[-1]) == 0


@pytest.mark.parametrize("direction", [Muon(), Denoised()])
def test_the_normalized_rule_keeps_the_size_of_a_direction_that_has_one(direction):
    lopt, phi = make(direction, Normalized(), Constant(0.01))
    plain = LearnedOptimizer(STRUCTURE, direction, step_size=Constant(0.01))
    alone = play(plain, common(phi, plain.template()), RECORDED)
    for update, v in zip(play(lopt, phi, RECORDED), alone):
        assert relative_difference(update, v) > 1e-2
        jax.tree.map(lambda u, w: np.testing.assert_allclose(rms(u), rms(w), rtol=1e-4), update, v)


def test_the_residual_is_bounded_relative_to_the_direction():
    base = LearnedOptimizer(STRUCTURE, Muon())
    for bound in (0.1, 1e6):
        lopt, phi = make(Muon(), Additive(bound))
        direction = play(base, common(phi, base.template()), RECORDED)[-1]
        learned = jax.tree.map(jnp.subtract, play(lopt, phi, RECORDED)[-1], direction)
        ratios = [rms(f) / rms(v) for f, v in zip(jax.tree.leaves(learned), jax.tree.leaves(direction))]
        assert (max(ratios) <= 0.1001) == (bound == 0.1)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        (Additive, {"bound": 0.0}, "Additive.bound must be positive, not 0.0"),
        (Constant, {"initial": -1.0}, "Constant.initial must be positive"),
        (PowerLaw, {"tau": float("nan")}, "PowerLaw.tau must be positive"),
        (PowerLaw, {"power": 0.0}, "PowerLaw.power must be positive"),
        (Feedback, {"gain": float("inf")}, "Feedback.gain must be positive"),
        (Momentum, {"decay": 1.0}, "Momentum.decay must be at least 0 and below 1"),
        (Denoised, {"gamma": 0.0}, "Denoised.gamma must be positive"),
        (Residual, {"weight": 0.0}, "Residual.weight must be positive"),
        (Residual, {"output_scale": -1.0}, "Residual.output_scale must be positive, or 0"),
        (Residual, {"output_scale": float("nan")}, "Residual.output_scale must be positive, or 0"),
        (PointwiseMLP, {"width": 0}, "PointwiseMLP.width must be a whole number"),
        (UNF, {"hidden_layers": 10**6}, "UNF.hidden_layers must be a whole number"),
        (GradMetaNetConfig, {"set_layers": True}, "GradMetaNetConfig.set_layers must be a whole number"),
        (SetReader, {"max_set_size": -1}, "SetReader.max_set_size must be a whole number"),
    ],
)
def test_impossible_settings_are_refused(part, settings, message):
    with pytest.raises(ValueError, match=message):
        part(**settings)


def test_scale_free_features_are_free_of_scale():
    rng = np.random.default_rng(0)
    parameter, gradients = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 3), (4, 5, 3)))

    def features(scale_p, scale_g):
        averages = jnp.zeros((4, 5, 3))
        for g in gradients:
            averages = ScaleFree().advance(averages, scale_g * g)
        return ScaleFree().of_entries(scale_p * parameter, scale_g * gradients[-1], averages, jnp.asarray(3))

    reference = features(1.0, 1.0)
    assert reference.shape == (15, ScaleFree.channels)
    np.testing.assert_allclose(jnp.mean(reference**2, axis=0), 1.0, rtol=1e-4)
    for scales in ((1e-6, 1e-9), (1e6, 1e6)):
        np.testing.assert_allclose(features(*scales), reference, rtol=2e-3, atol=1e-4)
