from dataclasses import replace

import jax.numpy as jnp
import pytest
from inner_problems import Smooth

from gmn_lopt.meta.averaging import averaged
from gmn_lopt.meta.pes import PES
from gmn_lopt.meta.stages import Stage, parse_stages
from gmn_lopt.meta.truncated import Truncated


def test_default_is_the_papers_setting():
    (stage,) = parse_stages("pes", Stage())
    assert stage == Stage("pes", 50_000, 1e-4, "constant", truncation=50, pairs=16, sigma=0.01, objective="mean")
    assert replace(stage, turns=1).build(Smooth(horizon=2000)) == PES(Smooth(horizon=2000), 16, 50, 0.01)
    # One device in the tests, a processor's: each unroll by itself, unless the stage says otherwise.
    assert stage.groups == 16 and parse_stages("pes:n=6:turns=3", Stage())[0].groups == 3


def test_a_stage_says_what_differs_from_the_default():
    text = "truncated:300:3e-3:K=25:n=8:clip=0.5:schedule=cosine, pes:10:sigma=0.1:objective=final"
    first, second = parse_stages(text, Stage(truncation=5, meta_steps=7))
    assert first == Stage("truncated", 300, 3e-3, "cosine", 25, 8, 0.01, 0.5)
    assert second == Stage("pes", 10, 1e-4, "constant", 5, 16, 0.1, objective="final")
    assert first.build(Smooth(horizon=50)) == Truncated(Smooth(horizon=50), 8, 25, 0.5, turns=8)


def test_meta_optimizer_clips_then_takes_adams_step():
    tx = Stage(learning_rate=0.1, meta_steps=4, schedule="cosine").meta_optimizer(clip_norm=1.0)
    phi, gradient = jnp.array([1.0, 2.0]), jnp.array([300.0, -400.0])
    state, sizes = tx.init(phi), []
    for _ in range(5):
        update, state = tx.update(gradient, state, phi)
        sizes.append(float(jnp.abs(update).max()))
    assert sizes[0] == pytest.approx(0.1, rel=1e-3)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[4] == 0
    assert jnp.allclose(state[1][0].mu, (1 - 0.9**5) * jnp.array([0.6, -0.8]), rtol=1e-4), "not clipped to norm 1"


def test_every_estimator_is_built_with_the_stages_settings():
    text = "nres:n=4:K=2:sigma=0.1:coefficient_sigma=0.3:shaping=clip,es:objective=final,truncated:ema=0.9"
    reused, forgetful, truncated = (stage.build(Smooth()) for stage in parse_stages(text, Stage(truncation=3)))
    assert reused == PES(Smooth(), 4, 2, 0.1, noise="reused", coefficient_sigma=0.3, shaping="clip", turns=4)
    assert forgetful == PES(Smooth(), 16, 3, 0.01, "final", noise="truncated", turns=16)
    assert truncated == Truncated(Smooth(), 16, 3, turns=16)


def updates(stage, phi, gradient, steps):
    """The updates of the first meta-steps at constant meta-parameters, and the last state."""
    tx, found = stage.meta_optimizer(clip_norm=1e9), []
    state = tx.init(phi)
    for _ in range(steps):
        update, state = tx.update(gradient, state, phi)
        found.append(update)
    return found, state


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [1, 2, 3, 3, 3, 3]), ("linear", [1, 2, 3, 2, 1, 0]), ("cosine", [1, 2, 3, 2.25, 0.75, 0])],
)
def test_schedules_after_a_warm_up(schedule, rates):
    stage = Stage(meta_steps=5, learning_rate=3.0, schedule=schedule, warmup=2)
    found, _ = updates(stage, jnp.array(0.0), jnp.array(-1.0), 6)
    # Adam's steps under a constant gradient are the learning rate.
    assert jnp.allclose(jnp.array(found), jnp.array(rates), atol=1e-4)


def test_coefficients_have_a_rate_of_their_own_and_no_weight_decay():
    phi = {"log_alpha": jnp.array(2.0), "backbone": {"log_w": jnp.array([2.0])}}
    gradient = {"log_alpha": jnp.array(-1.0), "backbone": {"log_w": jnp.array([-1.0])}}
    stage = Stage(learning_rate=0.1, coefficient_rate=5.0, weight_decay=0.01)
    (update,), _ = updates(stage, phi, gradient, 1)
    assert update["log_alpha"] == pytest.approx(0.5, rel=1e-4)
    assert update["backbone"]["log_w"][0] == pytest.approx(0.1 - 0.1 * 0.01 * 2, rel=1e-4)
    (update,), _ = updates(Stage(coefficient_rate=0.0), phi, gradient, 1)
    assert update["log_alpha"] == 0


def test_moving_average_of_the_meta_parameters():
    stage = Stage(learning_rate=0.1, ema=0.5)
    tx = stage.meta_optimizer(1.0)
    phi = jnp.array(1.0)
    state, seen = tx.init(phi), []
    assert averaged(state, phi) == 1
    for gradient in (-1.0, 0.5, 0.2):
        update, state = tx.update(jnp.array(gradient), state, phi)
        phi = phi + update
        seen.append(phi)
        if len(seen) == 1:
            assert averaged(state, phi) == phi, "the initial meta-parameters are part of the average"
    assert jnp.allclose(averaged(state, phi), (seen[0] + 2 * seen[1] + 4 * seen[2]) / 7, rtol=1e-6)
    assert averaged(Stage().meta_optimizer(1.0).init(phi), phi) is phi


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown estimator ''; choose one of pes, nres, es, truncated"),
        ("pse:10", "unknown estimator 'pse'"),
        ("pes:ten", "invalid literal"),
        ("pes:0", "meta_steps is 0; it must be positive"),
        ("pes:10:nan", "learning_rate is nan"),
        ("pes:10:1e-4:0.1", "cannot use '0.1'"),
        ("pes:10:1e-4:k=5", "cannot use 'k=5'"),
        ("pes:K=5:truncation=6", "cannot use 'truncation=6'"),
        ("pes:schedule=step", "unknown schedule 'step'; choose one of constant, cosine, linear"),
        ("nres:shaping=sign", "unknown shaping 'sign'"),
        ("pes:10:warmup=10", "warmup is 10; it must be less than the 10 meta-steps"),
        ("pes:warmup=-1", "warmup is -1; it must not be negative"),
        ("pes:coefficient_sigma=-0.1", "coefficient_sigma is -0.1"),
        ("pes:coefficient_rate=nan", "coefficient_rate is nan"),
        ("pes:weight_decay=inf", "weight_decay is inf"),
        ("pes:ema=1", "ema is 1.0; it must be at least 0 and less than 1"),
        ("pes,,pes", "unknown estimator ''"),
    ],
)
def test_wrong_text(text, message):
    with pytest.raises(ValueError, match=r"^stage '") as error:
        parse_stages(text, Stage())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
