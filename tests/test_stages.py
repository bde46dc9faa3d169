import jax.numpy as jnp
import pytest
from inner_problems import Smooth

from gmn_lopt.meta import NRES, PES, Truncated, TruncatedES
from gmn_lopt.meta.stages import Stage, parse_stage


def test_default_is_the_papers_setting():
    stage = parse_stage("pes")
    assert stage == Stage("pes", 50_000, 1e-4, "constant", truncation=50, pairs=16, sigma=0.01, objective="mean")
    assert parse_stage("pes:turns=1").build(Smooth(horizon=2000)) == PES(Smooth(horizon=2000), 16, 50, 0.01)
    # One device in the tests, a processor's: each unroll by itself, unless the stage says otherwise.
    assert stage.groups == 16 and parse_stage("pes:pairs=6,turns=3").groups == 3


def test_a_stage_says_what_differs_from_the_default():
    text = "truncated:meta_steps=300,learning_rate=3e-3,truncation=25,pairs=8,clip=0.5,schedule=cosine"
    stage = parse_stage(text)
    assert stage == Stage("truncated", 300, 3e-3, "cosine", 25, 8, clip=0.5)
    assert stage.build(Smooth(horizon=50)) == Truncated(Smooth(horizon=50), 8, 25, 0.5, turns=8)
    other = parse_stage("nres:sigma=0.1,objective=final", Stage(truncation=5, meta_steps=7))
    assert other == Stage("nres", 7, truncation=5, sigma=0.1, objective="final")


def test_meta_optimizer_clips_then_takes_adams_step():
    tx = Stage(learning_rate=0.1, meta_steps=4, schedule="cosine", meta_clip=1.0).meta_optimizer()
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
    texts = ("nres:pairs=4,truncation=2,sigma=0.1,coefficient_sigma=0.3", "es:objective=final", "truncated")
    reused, forgetful, truncated = (parse_stage(text, Stage(truncation=3)).build(Smooth()) for text in texts)
    assert reused == NRES(Smooth(), 4, 2, 0.1, coefficient_sigma=0.3, turns=4)
    assert forgetful == TruncatedES(Smooth(), 16, 3, 0.01, "final", turns=16)
    assert truncated == Truncated(Smooth(), 16, 3, turns=16)


def test_coefficients_have_a_rate_of_their_own():
    phi = {"residual": {"log_beta": jnp.array(2.0), "network": {"log_w": jnp.array([2.0])}}}
    gradient = {"residual": {"log_beta": jnp.array(-1.0), "network": {"log_w": jnp.array([-1.0])}}}
    for rate in (5.0, 0.0):
        tx = Stage(learning_rate=0.1, coefficient_rate=rate, meta_clip=1e9).meta_optimizer()
        update, _ = tx.update(gradient, tx.init(phi), phi)
        assert update["residual"]["log_beta"] == pytest.approx(0.1 * rate, rel=1e-4)
        assert update["residual"]["network"]["log_w"][0] == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "write NAME"),
        ("pse:meta_steps=10", "unknown estimator 'pse'; choose one of pes, nres, es, truncated"),
        ("pes:meta_steps=ten", "stage.meta_steps must be a whole number, not 'ten'"),
        ("pes:meta_steps=1e3", "stage.meta_steps must be a whole number, not 1000.0"),
        ("pes:meta_steps=0", "Stage.meta_steps must be a whole number of at least 1"),
        ("pes:learning_rate=nan", "stage.learning_rate must be a finite number, not 'nan'"),
        ("pes:learning_rate=1e999", "stage.learning_rate must be a finite number, not inf"),
        ("pes:0.1", "unknown estimator 'pes:0.1'"),
        ("pes:k=5", "cannot use k; the settings of a stage are meta_steps, learning_rate, schedule, truncation"),
        ("pes:estimator=nres", "cannot use estimator"),
        ("pes:pairs=True", "stage.pairs must be a whole number, not True"),
        ("pes:schedule=step", "unknown schedule 'step'; choose one of constant, cosine"),
        ("pes:coefficient_sigma=-0.1", "Stage.coefficient_sigma must be positive, not -0.1"),
        ("pes:coefficient_rate=-1", "Stage.coefficient_rate must be positive, or 0, not -1.0"),
        ("pes:pairs=6,turns=4", "Stage.turns must divide the 6 pairs, or be 0, not 4"),
    ],
)
def test_wrong_text(text, message):
    with pytest.raises(ValueError, match=r"^stage '") as error:
        parse_stage(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
