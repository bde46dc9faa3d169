"""The normalised rule, gate and bound; scale-free features; the subset of the set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizing import analyzed, lively, mlp, play, record, relative_difference

from gmn_lopt import Factors
from gmn_lopt.networks.gradmetanet import GradMetaNetConfig
from gmn_lopt.optimizers.features.scale_free import CHANNELS, celo_features, update_celo_averages
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.optimizers.set_subset import subset

MODEL = mlp(6, 9, 4)
STRUCTURE = analyzed(MODEL)
RECORDED = record(MODEL)
SMALL = GradMetaNetConfig(width=4, set_layers=1, product_width=4, out_features=3)


def make(**options):
    lopt = LearnedOptimizer(STRUCTURE, **({"gradmetanet": None, "width": 8} | options))
    return lopt, lively(lopt)


def rms(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


@pytest.mark.parametrize("backbone", ["ds", "celo"])
def test_normalized_steps_have_the_size_of_the_learning_rate(backbone):
    lopt, phi = make(backbone=backbone, rule="normalized", learning_rate=0.01)
    for update in play(lopt, phi, RECORDED):
        assert all(rms(u) == pytest.approx(0.01, rel=1e-4) for u in jax.tree.leaves(update))


def test_normalized_steps_do_not_depend_on_the_scale_of_the_loss():
    lopt, phi = make(backbone="celo", rule="normalized")
    smaller = [(p, jax.tree.map(lambda g: 1e-5 * g, grads), f) for p, grads, f in RECORDED]
    assert relative_difference(play(lopt, phi, smaller)[-1], play(lopt, phi, RECORDED)[-1]) < 1e-3


@pytest.mark.parametrize("scale", [0.0, 1e-18, 1e12])
def test_scale_free_features_are_finite_at_any_scale(scale):
    for shape in ((5, 4), (4,)):
        gradient = scale * jax.random.normal(jax.random.key(0), shape)
        averages = update_celo_averages(jnp.zeros((4, *shape)), gradient)
        features = celo_features(jnp.zeros(shape), gradient, averages, jnp.int32(0))
        assert jnp.isfinite(features).all() and jnp.abs(features).max() < 10


def test_learning_rate_schedule_and_weight_decay_enter_as_in_adamw():
    lopt, phi = make(backbone="celo", rule="normalized", learning_rate=0.01)
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
    with pytest.raises(ValueError, match="has learned its own learning rate"):
        make()[0].optimizer(make()[1], learning_rate=0.1)


def test_orthogonalized_steps_have_even_singular_values():
    lopt, phi = make(backbone="celo", rule="normalized", orthogonalize=True, learning_rate=1.0)
    update = play(lopt, phi, RECORDED)[-1]
    for layer in update:
        values = np.linalg.svd(np.asarray(layer["w"]), compute_uv=False)
        assert values.max() / values.min() < 3
        assert rms(layer["b"]) == pytest.approx(float(jnp.exp(phi["log_gamma"])), rel=1e-4)


def test_a_network_without_output_leaves_the_base():
    for options in ({"gate": True}, {"rule": "normalized", "orthogonalize": True}, {"base": "muon", "gate": True}):
        lopt = LearnedOptimizer(STRUCTURE, gradmetanet=None, output_scale=0.0, **options)
        phi = lopt.init(jax.random.key(0))
        louder = phi | {"log_beta": phi["log_beta"] + 5.0}
        assert relative_difference(play(lopt, louder, RECORDED)[-1], play(lopt, phi, RECORDED)[-1]) == 0


def test_the_gate_scales_the_direction_entry_by_entry():
    plain = LearnedOptimizer(STRUCTURE, "sgdm", base="muon")
    lopt, phi = make(base="muon", gate=True)
    phi |= {"log_beta": jnp.float32(-50.0)}
    base = play(plain, {n: phi[n] for n in ("log_alpha", "log_gamma")}, RECORDED)[0]
    gated = play(lopt, phi, RECORDED)[0]
    ratios = jnp.concatenate([(g / b).ravel() for g, b in zip(jax.tree.leaves(gated), jax.tree.leaves(base))])
    assert jnp.all(ratios > 0) and jnp.std(jnp.log(ratios)) > 1e-2


def test_alpha_falls_with_the_steps_taken():
    lopt, phi = make(base="muon", decay=True)
    assert {"tau", "power"} < lopt.scalars(phi).keys()
    phi |= {"log_tau": jnp.log(4.0), "log_power": jnp.log(0.5)}
    plain, _ = make(base="muon")
    same = {name: leaf for name, leaf in phi.items() if name not in ("log_tau", "log_power")}
    params, grads, _ = RECORDED[0]

    def update(lopt, phi, count):
        tx = lopt.optimizer(phi)
        return tx.update(grads, tx.init(params)._replace(step=jnp.int32(count)), params)[0]

    for count, factor in ((0, 1.0), (12, 0.5), (60, 0.25)):
        expected = jax.tree.map(lambda u, factor=factor: factor * u, update(plain, same, count))
        assert relative_difference(update(lopt, phi, count), expected) < 1e-5


@pytest.mark.parametrize("base", ["muon", "denoised"])
def test_the_normalized_rule_keeps_the_size_of_a_direction_that_has_one(base):
    direction = LearnedOptimizer(STRUCTURE, "sgdm", base=base)
    lopt, phi = make(backbone="celo", base=base, rule="normalized", learning_rate=0.01)
    alone = play(direction, {"log_alpha": jnp.log(0.01), "log_gamma": phi["log_gamma"]}, RECORDED)
    for update, v in zip(play(lopt, phi, RECORDED), alone):
        assert relative_difference(update, v) > 1e-2
        jax.tree.map(lambda u, w: np.testing.assert_allclose(rms(u), rms(w), rtol=1e-4), update, v)


def test_the_default_learning_rate_decays_and_the_users_own_replaces_it():
    lopt, phi = make(backbone="celo", rule="normalized", learning_rate=0.02, decay=True)
    phi |= {"log_tau": jnp.log(4.0), "log_power": jnp.log(1.0)}
    params, grads, _ = RECORDED[0]

    def size(step, **settings):
        tx = lopt.optimizer(phi, **settings)
        update = tx.update(grads, tx.init(params)._replace(step=jnp.int32(step)), params)[0]
        return rms(jax.tree.leaves(update)[0])

    assert size(0) == pytest.approx(0.02, rel=1e-4) and size(12) == pytest.approx(0.005, rel=1e-4)
    assert size(12, learning_rate=0.02) == pytest.approx(0.02, rel=1e-4)


def test_the_learned_part_is_bounded_relative_to_the_direction():
    base = LearnedOptimizer(STRUCTURE, "sgdm", base="adam")
    for bound in (0.1, 1e6):
        lopt, phi = make(base="adam", bound=bound)
        direction = play(base, {"log_alpha": phi["log_alpha"]}, RECORDED)[-1]
        learned = jax.tree.map(jnp.subtract, play(lopt, phi, RECORDED)[-1], direction)
        ratios = [rms(f) / rms(v) for f, v in zip(jax.tree.leaves(learned), jax.tree.leaves(direction))]
        assert (max(ratios) <= 0.1001) == (bound == 0.1)


def test_rules_that_do_not_go_together_are_refused():
    for options in (
        {"orthogonalize": True},
        {"rule": "normalized", "bound": 1.0},
    ):
        with pytest.raises(ValueError, match="rule"):
            LearnedOptimizer(STRUCTURE, **options)
    with pytest.raises(ValueError, match="orthogonal as it is"):
        LearnedOptimizer(STRUCTURE, rule="normalized", base="muon", orthogonalize=True)
    with pytest.raises(ValueError, match="rule"):
        LearnedOptimizer(STRUCTURE, rule="normalised")


def test_celo_features_are_free_of_scale():
    rng = np.random.default_rng(0)
    parameter, gradients = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 3), (4, 5, 3)))

    def features(scale_p, scale_g):
        averages = jnp.zeros((4, 5, 3))
        for g in gradients:
            averages = update_celo_averages(averages, scale_g * g)
        return celo_features(scale_p * parameter, scale_g * gradients[-1], averages, jnp.asarray(3))

    reference = features(1.0, 1.0)
    assert reference.shape == (15, CHANNELS)
    np.testing.assert_allclose(jnp.mean(reference**2, axis=0), 1.0, rtol=1e-4)
    for scales in ((1e-6, 1e-9), (1e6, 1e6)):
        np.testing.assert_allclose(features(*scales), reference, rtol=2e-3, atol=1e-4)


def test_every_element_is_as_often_in_the_subset():
    factors = Factors((jnp.arange(10.0)[:, None],), (100 + jnp.arange(10.0)[:, None], jnp.zeros((2, 3))))
    counts = np.zeros(10)
    for step in range(600):
        chosen = subset(factors, 4, jnp.asarray(step))
        index = np.asarray(chosen.activations[0][:, 0], int)
        assert len(set(index)) == 4
        np.testing.assert_array_equal(chosen.tangents[0][:, 0], 100 + index)
        assert chosen.tangents[1].shape == (2, 3)
        counts[index] += 1
    np.testing.assert_allclose(counts / 600, 0.4, atol=0.08)
    assert subset(factors, None, jnp.asarray(0)).activations[0].shape == (10, 1)


def test_a_bound_above_the_set_size_changes_nothing_and_one_below_keeps_less_state():
    whole, _ = make(gradmetanet=SMALL)
    phi = lively(whole)
    large, small = (
        LearnedOptimizer(
            STRUCTURE, width=8, gradmetanet=GradMetaNetConfig(4, 1, product_width=4, out_features=3, max_set_size=n)
        )
        for n in (50, 5)
    )
    assert relative_difference(play(large, phi, RECORDED)[-1], play(whole, phi, RECORDED)[-1]) == 0
    assert relative_difference(play(small, phi, RECORDED)[-1], play(whole, phi, RECORDED)[-1]) > 1e-4
    state = small.optimizer(phi).init(MODEL[1])
    assert {leaf.shape[1] for leaf in jax.tree.leaves(state.factor_averages)} == {5}
