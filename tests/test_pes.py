import doctest
import importlib
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inner_problems import Diverging, InfluenceBalancing, Smooth

import gmn_lopt
from gmn_lopt.meta import NRES, PES, Truncated, TruncatedES

KEY = jax.random.key(0)
GOLDEN = np.load(Path(__file__).parent / "golden" / "estimators.npz")


@pytest.mark.parametrize("objective", ["mean", "final"])
@pytest.mark.parametrize("estimator", [PES, NRES, TruncatedES, Truncated])
def test_estimates_are_those_that_were_recorded(estimator, objective):
    """Four in a row: gradients, losses, noise, losses of each truncation and where it began."""
    problem = Smooth(noise=0.1)
    estimator = estimator(problem, 4, 2, objective=objective, **({} if estimator is Truncated else {"sigma": 0.5}))
    phi, data, rows = problem.phi(), problem.data(), []
    state, estimate = estimator.init(phi, data, jax.random.key(0)), jax.jit(estimator.estimate)
    for i in range(4):
        state, e = estimate(phi, state, data, jax.random.fold_in(jax.random.key(1), i))
        parts = (e.gradient["a"], e.gradient["b"], e.loss, e.noise, e.truncation_loss, e.truncation_start)
        rows.append(np.concatenate([np.ravel(part) for part in parts]))
    np.testing.assert_allclose(rows, GOLDEN[f"{type(estimator).__name__} {objective}"], rtol=1e-6, atol=1e-6)


MODULES = ("pes", "nres", "truncated_es", "truncated", "coefficients", "stages", "estimator", "task")


@pytest.mark.parametrize("module", [*MODULES, "training_problem", "presets"])
def test_examples(module):
    known = {"jax": jax, "jnp": jnp, "gmn_lopt": gmn_lopt}
    found = doctest.testmod(importlib.import_module(f"gmn_lopt.meta.{module}"), extraglobs=known)
    assert found.attempted and not found.failed


def run(estimator, phi, data, truncations, seed=0):
    """The estimates of a run at fixed meta-parameters, and the states before and after each."""
    state = estimator.init(phi, data, jax.random.fold_in(KEY, seed))
    estimate, states, estimates = jax.jit(estimator.estimate), [state], []
    for i in range(truncations):
        state, result = estimate(phi, state, data, jax.random.fold_in(KEY, 1000 * (seed + 1) + i))
        states.append(state)
        estimates.append(result)
    return states, estimates


def total(estimates):
    return jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *[e.gradient for e in estimates])


@pytest.mark.parametrize("strategy", [PES, NRES])
@pytest.mark.parametrize(("truncation", "objective"), [(1, "mean"), (3, "mean"), (2, "final"), (6, "final")])
def test_truncations_of_an_episode_sum_to_the_exact_gradient(truncation, objective, strategy):
    problem, sigma, pairs = Smooth(), 0.003, 6000
    phi, data = problem.phi(), problem.data()
    estimator = strategy(problem, pairs=pairs, truncation=truncation, sigma=sigma, objective=objective)
    state = estimator.init(phi, data, KEY)
    # All pairs in step, so that one pass over the horizon is one whole episode of every pair.
    state = state._replace(length=jnp.full(pairs, problem.horizon))
    estimate, estimates = jax.jit(estimator.estimate), []
    for i in range(problem.horizon // truncation):
        state, result = estimate(phi, state, data, jax.random.key(i))
        estimates.append(result)

    def exact(phi):
        losses = problem.losses(phi, data)
        return losses[-1] if objective == "final" else losses.sum() / truncation

    expected = jax.grad(exact)(phi)
    # The truncations' errors add up at worst linearly; `noise` is the standard error of the norm of the whole gradient.
    error = sum(float(e.noise) for e in estimates)
    difference = jax.tree.map(jnp.subtract, total(estimates), expected)
    distance = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(difference)))
    scale = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(expected)))
    assert distance < 2 * error
    assert 2 * error < 0.3 * scale, "the test could not fail"


def test_one_truncation_per_episode_is_antithetic_es():
    problem, sigma = Smooth(), 0.05
    phi, data = problem.phi(), problem.data()
    (_, state), (estimate,) = run(PES(problem, 7, problem.horizon, sigma), phi, data, 1)
    by_hand = []
    for i in range(7):
        noise = jax.tree.map(lambda leaf, i=i: leaf[i], state.xi)
        plus = problem.losses(jax.tree.map(jnp.add, phi, noise), data).mean()
        minus = problem.losses(jax.tree.map(jnp.subtract, phi, noise), data).mean()
        by_hand.append(jax.tree.map(lambda e, d=plus - minus: e * d / (2 * sigma**2), noise))
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *by_hand)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), estimate.gradient, expected)


def test_perturbations_accumulate_over_truncations():
    """The second estimate, by hand: accumulated perturbation, last perturbation applied, persistent states."""
    problem, sigma = Smooth(horizon=4), 0.05
    phi, data = problem.phi(), problem.data()
    estimator = PES(problem, 1, 2, sigma)
    states, estimates = run(estimator, phi, data, 2)
    first = jax.tree.map(lambda leaf: leaf[0], states[1].xi)
    second = jax.tree.map(lambda a, b: a[0] - b[0], states[2].xi, states[1].xi)
    means = []
    for sign in (1, -1):
        state, losses = problem.init(optax.tree.add_scale(phi, sign, first), data, KEY), []
        for noise in (first, first, second, second):
            perturbed = optax.tree.add_scale(phi, sign, noise)
            state, loss = problem.step(perturbed, state, data, KEY)
            losses.append(loss)
        means.append(np.mean(losses[2:]))
    expected = jax.tree.map(lambda a, b: (a + b) * (means[0] - means[1]) / (2 * sigma**2), first, second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), estimates[1].gradient, expected)


@dataclass(frozen=True)
class Linear:
    """A linear recurrence, ``x <- x + phi``, with the loss ``w . x``: after ``t`` steps it is ``t w . phi``."""

    horizon: int = 12
    loss_cap: float = np.inf

    def init(self, phi, data, key):
        return jax.tree.map(jnp.zeros_like, phi)

    def step(self, phi, state, data, key):
        state = jax.tree.map(jnp.add, state, phi)
        return state, optax.tree.vdot(data, state)


def test_reused_noise_in_closed_form():
    """Every pair's sum over an episode is its perturbation times the exact derivative along it, over the variance."""
    problem, sigma, truncation = Linear(), 0.2, 4
    phi, data = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(0.5)}, {"a": jnp.array([0.3, -0.7]), "b": jnp.array(2.0)}
    states, estimates = run(NRES(problem, 1, truncation, sigma), phi, data, 6)
    for first in (1, 4):
        noises = [jax.tree.map(lambda leaf: leaf[0], state.xi) for state in states[first : first + 3]]
        jax.tree.map(lambda *leaves: [np.testing.assert_array_equal(leaves[0], leaf) for leaf in leaves], *noises)
        slope = optax.tree.vdot(noises[0], data) * sum(range(1, problem.horizon + 1)) / truncation / sigma**2
        expected = jax.tree.map(lambda e, s=slope: e * s, noises[0])
        found = total(estimates[first - 1 : first + 2])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)
    assert states[1].xi["b"] != states[4].xi["b"], "the next episode has a perturbation of its own"


@pytest.mark.parametrize("strategy", [PES, NRES, TruncatedES])
def test_coefficients_have_perturbations_of_their_own_size(strategy):
    problem, pairs = Linear(horizon=8), 4000
    phi = {"log_alpha": jnp.array(0.0), "network": {"log_w": jnp.zeros(3)}}
    data = {"log_alpha": jnp.array(2.0), "network": {"log_w": jnp.array([1.0, -1.0, 0.5])}}
    estimator = strategy(problem, pairs, 8, sigma=0.01, coefficient_sigma=0.5)
    state = estimator.init(phi, data, KEY)._replace(length=jnp.full(pairs, 8))
    state, estimate = jax.jit(estimator.estimate)(phi, state, data, KEY)
    assert np.std(state.xi["log_alpha"]) == pytest.approx(0.5, rel=0.1)
    assert np.std(state.xi["network"]["log_w"]) == pytest.approx(0.01, rel=0.1)
    assert estimate.gradient["log_alpha"] == pytest.approx(4.5 * 2.0, rel=0.1)
    # The weights' estimate is drowned by the coefficient's larger share in the difference: its error is what to expect.
    error = optax.tree.norm(jax.tree.map(lambda g, d: g - 4.5 * d, estimate.gradient, data))
    assert error < 2 * estimate.noise


def test_influence_balancing():
    """PES has the sign of the long-run gradient, truncated estimators that of the short-run one."""
    problem, phi = InfluenceBalancing(), jnp.array(0.5)
    _, exact = run(Truncated(problem, 100, problem.horizon, clip=1e9), phi, None, 1)
    assert exact[0].gradient > 10

    def late_mean(estimator):
        # The first horizon of staggered, shorter episodes is not representative; one full horizon after it is.
        _, estimates = run(estimator, phi, None, 200)
        values = np.array([e.gradient for e in estimates[100:]])
        return values.mean(), np.sqrt(np.mean([e.noise**2 for e in estimates[100:]]))

    mean, error = late_mean(PES(problem, pairs=200, truncation=1, sigma=0.1))
    assert abs(mean - exact[0].gradient) < 2 * error
    assert mean > 2 * error
    reused, reused_error = late_mean(NRES(problem, pairs=200, truncation=1, sigma=0.1))
    assert abs(reused - exact[0].gradient) < 3 * reused_error
    assert late_mean(TruncatedES(problem, pairs=2000, truncation=1, sigma=0.1))[0] < -0.1
    assert late_mean(Truncated(problem, 100, truncation=1, clip=1e9))[0] < -0.1


def test_pairs_share_problems_and_batches():
    problem = Smooth(noise=0.5)
    phi, data = problem.phi(), problem.data()
    states, _ = run(PES(problem, 5, 2, sigma=1e-6), phi, data, 1)
    x = states[1].inner["x"]
    np.testing.assert_allclose(x[:, 0], x[:, 1], atol=1e-4)
    assert len(np.unique(np.round(x[:, 0, 0], 3))) == 5


def test_staggered_starts_and_restarts():
    problem = Smooth(horizon=8, noise=0.1)
    states, estimates = run(PES(problem, 4, 2), problem.phi(), problem.data(), 6)
    starts = np.array([e.truncation_start for e in estimates])
    np.testing.assert_array_equal(
        starts.T, [[0, 2, 4, 6, 0, 2], [0, 2, 4, 0, 2, 4], [0, 2, 0, 2, 4, 6], [0, 0, 2, 4, 6, 0]]
    )
    for before, after, start in zip(states[:-1], states[1:], starts):
        # The problem counts its own steps: it is new exactly where the truncation starts at 0.
        np.testing.assert_array_equal(after.inner["count"], np.stack([start + 2] * 2, axis=1))
        small = np.abs(after.xi["b"]).max(axis=1) < 0.06
        assert small[start == 0].all()
        assert (before.inner["key"] != after.inner["key"]).any(axis=1)[start == 0].all() or before is states[0]


def test_same_arguments_same_bits():
    problem = Smooth(noise=0.1)
    runs = [run(PES(problem, 4, 2), problem.phi(), problem.data(), 3) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, runs[0][1], runs[1][1])
    other = run(PES(problem, 4, 2), problem.phi(), problem.data(), 3, seed=1)
    assert not np.array_equal(runs[0][1][0].gradient["a"], other[1][0].gradient["a"])


@pytest.mark.parametrize("cap", [3.0, np.inf])
def test_diverging_problems_do_not_poison_the_estimate(cap):
    states, estimates = run(PES(Diverging(loss_cap=cap), 16, 10), jnp.array(0.1), None, 8)
    assert not all(np.isfinite(s.inner).all() for s in states[1:]), "the test could not fail"
    for estimate in estimates:
        assert np.isfinite(estimate.gradient)
        assert estimate.gradient != 0
        assert np.isfinite(estimate.noise)
        if np.isfinite(cap):
            assert estimate.truncation_loss.max() == cap


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truncation": 4}, "does not divide the horizon 6; choose a divisor, such as 1, 2, 3, 6"),
        ({"truncation": 0}, "truncation is 0"),
        ({"pairs": -1}, "pairs is -1"),
        ({"sigma": 0.0}, "sigma is 0.0"),
        ({"sigma": float("nan")}, "sigma is nan"),
        ({"objective": "best"}, "unknown objective 'best'"),
        ({"coefficient_sigma": -1.0}, "coefficient_sigma is -1.0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        PES(Smooth(), **{"truncation": 2, **settings})
    assert "\n" not in str(error.value)
