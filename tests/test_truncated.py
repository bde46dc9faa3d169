import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inner_problems import Diverging, Smooth

from gmn_lopt.meta import Truncated

KEY = jax.random.key(0)


def two_truncations(estimator, problem):
    phi, data = problem.phi(), problem.data()
    state = estimator.init(phi, data, KEY)
    state = state._replace(length=jnp.full_like(state.length, problem.horizon))
    estimate = jax.jit(estimator.estimate)
    state, first = estimate(phi, state, data, jax.random.key(1))
    _, second = estimate(phi, state, data, jax.random.key(2))
    return first, second


def by_hand(problem, objective="mean"):
    """Gradients of the two truncations of 3 steps, in plain Python; the second does not see through the first."""
    phi, data = problem.phi(), problem.data()

    def truncation(phi, x):
        losses = []
        for _ in range(3):
            x = jnp.tanh(phi["a"] @ x + phi["b"])
            losses.append(jnp.sum((x - data) ** 2))
        return (losses[-1] if objective == "final" else sum(losses) / 3), x

    first, x = jax.grad(lambda phi: truncation(phi, jnp.tanh(phi["b"])), has_aux=True)(phi)
    second, _ = jax.grad(truncation, has_aux=True)(phi, x)
    return first, second


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


@pytest.mark.parametrize("remat", [False, True])
def test_equals_the_gradient_by_hand(remat):
    problem = Smooth()
    first, second = two_truncations(Truncated(problem, 2, 3, clip=1e9, remat=remat), problem)
    expected = by_hand(problem)
    assert_close(first.gradient, expected[0])
    assert_close(second.gradient, expected[1])
    np.testing.assert_array_equal(second.truncation_start, 3)
    np.testing.assert_allclose(first.noise, 0, atol=1e-6)


def test_final_objective_sees_only_the_last_step():
    problem = Smooth()
    first, second = two_truncations(Truncated(problem, 2, 3, clip=1e9, objective="final"), problem)
    assert all(not leaf.any() for leaf in jax.tree.leaves(first.gradient))
    assert_close(second.gradient, by_hand(problem, "final")[1])


def test_each_unroll_is_clipped():
    problem = Smooth(noise=0.5)
    phi, data = problem.phi(), problem.data()
    gradients = []
    for clip in (1e9, 0.1):
        estimator = Truncated(problem, 1, 3, clip)
        estimate = jax.jit(estimator.estimate)(phi, estimator.init(phi, data, KEY), data, KEY)[1]
        gradients.append(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(estimate.gradient)]))
        assert np.isnan(estimate.noise), "one unroll cannot tell its noise"
    free, clipped = gradients
    assert np.linalg.norm(free) > 0.1
    np.testing.assert_allclose(clipped, 0.1 * free / np.linalg.norm(free), rtol=1e-5)


@pytest.mark.parametrize("cap", [3.0, np.inf])
def test_diverging_problems_do_not_poison_the_gradient(cap):
    estimator = Truncated(Diverging(loss_cap=cap), 16, 10)
    phi = jnp.array(0.1)
    state, estimate = estimator.init(phi, None, KEY), jax.jit(estimator.estimate)
    for i in range(6):
        state, result = estimate(phi, state, None, jax.random.key(i))
        assert np.isfinite(result.gradient)
        assert result.gradient < 0, "the problems that do not diverge want larger steps"
        assert np.isfinite(result.noise)
    assert not np.isfinite(state.inner).all(), "the test could not fail"


def test_wrong_settings():
    with pytest.raises(ValueError, match="does not divide the horizon 6"):
        Truncated(Smooth(), truncation=5)
    with pytest.raises(ValueError, match="clip is 0"):
        Truncated(Smooth(), truncation=3, clip=0)
    with pytest.raises(ValueError, match="unrolls is 0"):
        Truncated(Smooth(), truncation=3, unrolls=0)
