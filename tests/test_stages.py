import jax.numpy as jnp
import pytest
from inner_problems import Smooth

from gmn_lopt.meta.pes import PES
from gmn_lopt.meta.stages import Stage, parse_stages
from gmn_lopt.meta.truncated import Truncated


def test_default_is_the_papers_setting():
    (stage,) = parse_stages("pes", Stage())
    assert stage == Stage("pes", 50_000, 1e-4, "constant", truncation=50, pairs=16, sigma=0.01, objective="mean")
    assert stage.build(Smooth(horizon=2000)) == PES(Smooth(horizon=2000), 16, 50, 0.01)


def test_a_stage_says_what_differs_from_the_default():
    text = "truncated:300:3e-3:K=25:n=8:clip=0.5:schedule=cosine, pes:10:sigma=0.1:objective=final"
    first, second = parse_stages(text, Stage(truncation=5, meta_steps=7))
    assert first == Stage("truncated", 300, 3e-3, "cosine", 25, 8, 0.01, 0.5)
    assert second == Stage("pes", 10, 1e-4, "constant", 5, 16, 0.1, objective="final")
    assert first.build(Smooth(horizon=50)) == Truncated(Smooth(horizon=50), 8, 25, 0.5)


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown estimator ''; choose one of pes, truncated"),
        ("pse:10", "unknown estimator 'pse'"),
        ("pes:ten", "invalid literal"),
        ("pes:0", "meta_steps is 0; it must be positive"),
        ("pes:10:nan", "learning_rate is nan"),
        ("pes:10:1e-4:0.1", "cannot use '0.1'"),
        ("pes:10:1e-4:k=5", "cannot use 'k=5'"),
        ("pes:K=5:truncation=6", "cannot use 'truncation=6'"),
        ("pes:schedule=linear", "unknown schedule 'linear'"),
        ("pes,,pes", "unknown estimator ''"),
    ],
)
def test_wrong_text(text, message):
    with pytest.raises(ValueError, match=r"^stage '") as error:
        parse_stages(text, Stage())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
