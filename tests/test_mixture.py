"""Mixtures of inner problems, their augmentation, and unrolls in turns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inner_problems import Smooth

import gmn_lopt
from gmn_lopt import Constant, Denoised, Normalized, PointwiseMLP, PowerLaw, Recipe, Residual, ScaleFree
from gmn_lopt.meta import PES, Truncated
from gmn_lopt.meta.augmentation import AugmentedProblem
from gmn_lopt.meta.meta_step import MetaStep
from gmn_lopt.meta.mixture import MixedMetaStep, MixtureProblem
from gmn_lopt.meta.stages import parse_stage
from gmn_lopt.meta.task import task_structure
from gmn_lopt.meta.truncation import map_unrolls
from gmn_lopt.tasks import load_task
from gmn_lopt.tasks.mixture import MODELS


@pytest.mark.parametrize("estimator", [PES, Truncated])
def test_turns_change_nothing(estimator):
    problem = Smooth(noise=0.1)
    results = []
    for turns in (1, 2, 6):
        e = estimator(problem, 6, 3, turns=turns)
        state = e.init(problem.phi(), problem.data(), jax.random.key(0))
        results.append(jax.jit(e.estimate)(problem.phi(), state, problem.data(), jax.random.key(1)))
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(results[0]), strict=True):
            if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_each_unroll_comes_back_to_its_place():
    x = jnp.arange(12.0).reshape(6, 2)
    for turns in (1, 2, 3, 6):
        np.testing.assert_array_equal(map_unrolls(lambda a, b: a + 10 * b, turns, x, x), 11 * x)


def test_a_mixture_takes_its_problems_in_turn_and_weighs_them():
    problems = (Smooth(), Smooth(horizon=12))
    data = tuple(problem.data() for problem in problems)
    parts, weights, phi = [Truncated(problem, 2, 3) for problem in problems], (1.0, 10.0), problems[0].phi()
    sgd = optax.sgd(0.1)
    mixed = MixedMetaStep(tuple(MetaStep(part, sgd, w) for part, w in zip(parts, weights)))
    assert (mixed.inner_steps, mixed.programs) == (6, 2)
    step_key = jax.random.key(1)
    state = mixed.init(phi, data, jax.random.key(0))
    for number in range(5):
        i = number % 2
        before = jax.tree.map(jnp.array, state)  # the meta-step uses the memory of its argument again
        state, metrics = mixed(state, data, step_key, number)
        key = jax.random.fold_in(step_key, number)
        unrolls, alone = parts[i].estimate(before.phi, before.estimator[i], data[i], key)
        np.testing.assert_allclose(metrics["loss"], weights[i] * alone.loss, rtol=1e-5)
        expected = jax.tree.map(lambda p, g, w=weights[i]: p - 0.1 * w * g, before.phi, alone.gradient)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.phi, expected)
        np.testing.assert_array_equal(state.estimator[i].step, unrolls.step)
        np.testing.assert_array_equal(state.estimator[1 - i].step, before.estimator[1 - i].step)


def make_problem(step_size=None, **options):
    task = load_task("digits_mlp", hidden=(8,), batch_size=16, horizon=20, augment=False)
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = jax.eval_shape(task.sample, jax.random.key(0), task.data["train"])
    structure = gmn_lopt.analyze(task.loss, params, batch)
    residual = Residual(ScaleFree(), PointwiseMLP(width=4, hidden_layers=3), weight=0.1)
    lopt = Recipe(residual=residual, rule=Normalized(), step_size=step_size or Constant(0.01)).build(structure)
    return AugmentedProblem(task, lopt, **options), lopt.init(jax.random.key(0))


def test_augmentation_trains_the_same_model_in_other_coordinates():
    problem, phi = make_problem()
    data = problem.splits()
    for seed in range(4):
        state = problem.init(phi, data, jax.random.key(seed))
        scales = np.array(jax.tree.leaves(state.scales))
        assert len(set(scales)) == 4 and np.all((scales > 1 / 3.01) & (scales < 3.01))
        assert 1 / 3.01 < float(state.factor) < 3.01
        new, loss = jax.jit(problem.step)(phi, state, data, jax.random.key(9))
        params = jax.tree.map(jnp.multiply, state.scales, state.params)
        batch = problem.task.sample(jax.random.split(jax.random.key(9))[0], data["train"])
        assert float(loss) == pytest.approx(float(problem.task.loss(params, batch)), rel=1e-5)
        # The normalised rule: a step of what is trained has the size of the rate times the factor, whatever the scale.
        for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(state.params)):
            assert float(jnp.sqrt(jnp.mean((a - b) ** 2))) == pytest.approx(0.01 * float(state.factor), rel=1e-2)


def test_tensors_that_take_the_denoised_step_are_left_alone():
    """Their steps read the factors, which are not those of other coordinates."""
    task = load_task("text_transformer", blocks=1)
    structure = task_structure(task)
    for direction in (Denoised(), gmn_lopt.Momentum()):
        lopt = Recipe(direction=direction, rule=Normalized(), step_size=Constant(0.01)).build(structure)
        problem = AugmentedProblem(task, lopt)
        state = problem.init(lopt.init(jax.random.key(0)), problem.splits(), jax.random.key(0))
        named = {jax.tree_util.keystr(path): scale for path, scale in jax.tree.leaves_with_path(state.scales)}
        scaled = {name for name, scale in named.items() if scale != 1.0}
        loose = {name for name in named if "norm" in name or "position" in name}
        assert scaled == (loose if direction == Denoised() else set(named))


def test_half_of_the_learning_rates_decay_to_zero():
    problem, phi = make_problem(scale_range=1.0, rate_range=1.0)
    data = problem.splits()
    states = jax.vmap(problem.init, in_axes=(None, None, 0))(phi, data, jax.random.split(jax.random.key(0), 64))
    assert 16 < int(states.decays.sum()) < 48 and np.allclose(states.factor, 1.0)
    step = jax.jit(problem.step)
    for decays in (True, False):
        state = problem.init(phi, data, jax.random.key(0))._replace(decays=jnp.asarray(decays))
        sizes = []
        for t in range(20):
            new, _ = step(phi, state, data, jax.random.key(t))
            moved = new.params["layer_0"]["kernel"] - state.params["layer_0"]["kernel"]
            sizes.append(float(jnp.sqrt(jnp.mean(moved**2))))
            state = new
        expected = 0.005 * (1 + np.cos(np.pi * np.arange(20) / 20)) if decays else np.full(20, 0.01)
        np.testing.assert_allclose(sizes, expected, rtol=2e-2)


def test_an_optimizer_with_a_schedule_of_its_own_goes_by_it():
    problem, phi = make_problem(PowerLaw(0.01, tau=30.0, power=1.0), scale_range=1.0)
    data = problem.splits()
    states = jax.vmap(problem.init, in_axes=(None, None, 0))(phi, data, jax.random.split(jax.random.key(0), 64))
    assert not states.decays.any() and len(set(np.array(states.factor))) == 64
    state, step = jax.tree.map(lambda x: x[0], states), jax.jit(problem.step)
    for t in range(20):
        new, _ = step(phi, state, data, jax.random.key(t))
        moved = new.params["layer_0"]["kernel"] - state.params["layer_0"]["kernel"]
        expected = 0.01 * float(state.factor) / (1 + t / 30)
        assert float(jnp.sqrt(jnp.mean(moved**2))) == pytest.approx(expected, rel=2e-2)
        state = new


def test_augmentation_needs_the_normalized_rule():
    problem, _ = make_problem()
    additive = Recipe().build(problem.lopt.structure)
    with pytest.raises(ValueError, match="Normalized rule"):
        AugmentedProblem(problem.task, additive)


def test_a_stage_makes_the_meta_steps_of_a_mixture():
    problem, phi = make_problem()
    mixed = MixtureProblem((problem, problem), (1.0, 2.0))
    meta_step = parse_stage("truncated:meta_steps=5,truncation=4,pairs=2").meta_step(mixed)
    assert [step.weight for step in meta_step.steps] == [1.0, 2.0] and mixed.horizon == 20
    data = mixed.splits()
    state = meta_step.init(phi, data, jax.random.key(0))
    for number in range(2):
        state, metrics = meta_step(state, data, jax.random.key(1), number)
        assert jnp.isfinite(metrics["loss"])


def test_validation_loss_of_an_augmented_problem():
    problem, phi = make_problem()
    validating = dataclasses.replace(problem, meta_loss="validation")
    data, other = validating.splits(), problem.task.data["test"]
    state = validating.init(phi, data, jax.random.key(0))
    step, key = jax.jit(validating.step), jax.random.key(9)
    new, loss = step(phi, state, data, key)
    same, changed = step(phi, state, {**data, "valid": other}, key)
    jax.tree.map(np.testing.assert_array_equal, new.params, same.params)  # not trained on
    assert float(loss) != float(changed)
    assert float(loss) != float(jax.jit(problem.step)(phi, state, data, key)[1])


def test_the_mixture_is_as_wide_as_it_says():
    models = [settings for _, settings in MODELS]
    assert {name for name, _ in MODELS} == {"digits", "fashion_mnist", "cifar10", "cifar100"}
    assert min(min(m["hidden"]) for m in models) == 16 and max(max(m["hidden"]) for m in models) == 256
    assert {len(m["hidden"]) for m in models} == {1, 2, 3}
    assert {m["batch_size"] for m in models} == {32, 64, 128, 256}
    assert min(m["horizon"] for m in models) == 200 and max(m["horizon"] for m in models) == 5000
    assert all(m["horizon"] % 50 == 0 for m in models)
    assert {m.get("init_scale", 1.0) for m in models} == {1 / 3, 1.0, 3.0}
    assert {m.get("autoencode", False) for m in models} == {False, True}
