import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inner_problems import Smooth

from gmn_lopt import LearnedOptimizer
from gmn_lopt.factors.value_and_grad import value_grad_and_factors
from gmn_lopt.meta.imitation import LARGEST, ImitationProblem, relative_distance
from gmn_lopt.meta.stages import Stage, parse_stages
from gmn_lopt.meta.task import task_structure
from gmn_lopt.meta.training_problem import TrainingProblem
from gmn_lopt.meta.truncated import Truncated
from gmn_lopt.optimizers.direction import parse_direction
from gmn_lopt.tasks import load_task

TASK = load_task("digits_mlp")
STRUCTURE = task_structure(TASK)


def test_direction_is_the_base_with_its_falling_step_size():
    lopt, phi = parse_direction("muon/0.06:100:0.5", STRUCTURE)
    assert (lopt.backbone, lopt.base, lopt.decay) == ("sgdm", "muon", True)
    found = lopt.scalars(phi)
    assert {n: pytest.approx(float(found[n])) for n in ("alpha", "tau", "power")} == {
        "alpha": 0.06,
        "tau": 100,
        "power": 0.5,
    }
    assert not parse_direction("adam:0.01", STRUCTURE)[0].decay


@pytest.mark.parametrize("text", ["muon", "muon:x", "muon:1:2", "muon:-1", "muon:0.1:inf:1", "muon:nan", "newton:1"])
def test_what_is_no_direction_is_refused(text):
    with pytest.raises(ValueError, match=f"direction '{text}': [^\\n]+$"):
        parse_direction(text, STRUCTURE)


def test_distance():
    wanted = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[2.0]])}
    assert relative_distance(wanted, wanted) == pytest.approx(0, abs=1e-6)
    assert relative_distance(jax.tree.map(jnp.zeros_like, wanted), wanted) == pytest.approx(1)
    assert relative_distance({"a": jnp.array([3.0, 9.0]), "b": jnp.array([[8.0]])}, wanted) == pytest.approx(2)
    assert relative_distance(optax.tree.scale(1e4, wanted), wanted) == LARGEST
    zeros = jax.tree.map(jnp.zeros_like, wanted)
    gradient = jax.grad(lambda s: relative_distance(optax.tree.scale(s, wanted), zeros))(1.0)
    assert jnp.isfinite(gradient), "an expert that stands still"


def test_a_step_trains_and_adds_the_distance_from_what_the_expert_would_have_done():
    lopt = LearnedOptimizer(STRUCTURE, "ds", None, width=4)
    phi, key = lopt.init(jax.random.key(1)), jax.random.key(2)
    problem = TrainingProblem(TASK, lopt)
    data = problem.splits()
    guided = ImitationProblem(problem, "denoised:0.06:30:0.9", 0.5)
    state, plain = guided.init(phi, data, key), problem.init(phi, data, key)
    expert, coefficients = parse_direction("denoised:0.06:30:0.9", STRUCTURE)
    tx = expert.optimizer(coefficients)
    expert_state = tx.init(plain.params)
    for step_key in jax.random.split(key, 3):
        batch = TASK.sample(jax.random.split(step_key)[0], data["train"])
        _, grads, factors = value_grad_and_factors(TASK.loss)(plain.params, batch)
        wanted, expert_state = tx.update(grads, expert_state, plain.params, factors=factors)
        before = plain.params
        plain, loss = problem.step(phi, plain, data, step_key)
        state, total = guided.step(phi, state, data, step_key)
        moved = optax.tree.sub(plain.params, before)
        assert total == pytest.approx(float(loss + 0.5 * relative_distance(moved, wanted)), rel=1e-4)
        for a, b in zip(jax.tree.leaves(state.training.params), jax.tree.leaves(plain.params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_meta_gradient_has_the_closed_form():
    """Learned and expert step are multiples of one direction; in a window of one step d|a - b| / b / dlog a = a / b."""
    lopt = LearnedOptimizer(STRUCTURE, "sgdm", base="adam")
    phi = lopt.init(jax.random.key(0)) | {"log_alpha": jnp.log(0.006)}
    stage = parse_stages("truncated:K=1:n=2:clip=100:imitation=2:expert=adam/0.002", Stage())[0]
    estimator = stage.build(TrainingProblem(TASK, lopt))
    assert isinstance(estimator, Truncated) and isinstance(estimator.problem, ImitationProblem)
    data = estimator.problem.splits()
    state = estimator.init(phi, data, jax.random.key(1))
    _, estimate = estimator.estimate(phi, state, data, jax.random.key(2))
    assert estimate.gradient["log_alpha"] == pytest.approx(2 * 3, rel=1e-4)
    assert estimate.loss > 4, "the distance of 2 is not part of the loss"


def test_what_cannot_be_imitated_is_refused():
    lopt = LearnedOptimizer(STRUCTURE, "ds", None)
    with pytest.raises(ValueError, match="without augmentation"):
        Stage(imitation=1.0).build(Smooth(horizon=50))
    with pytest.raises(ValueError, match="BASE:ALPHA"):
        Stage(imitation=1.0, expert="denoised").build(TrainingProblem(TASK, lopt))
    with pytest.raises(ValueError, match="weight of imitation"):
        ImitationProblem(TrainingProblem(TASK, lopt), "adam:0.01", 0)
    with pytest.raises(ValueError, match="imitation is -1"):
        Stage(imitation=-1.0)
