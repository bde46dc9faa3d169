from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gmn_lopt.meta import PES, Task, TrainingProblem, Truncated


@dataclass(frozen=True)
class LogRate:
    """A learned optimizer with one meta-parameter: SGD's log learning rate. Optionally it insists on factors."""

    needs_factors: bool = False

    def optimizer(self, phi):
        def update(grads, state, params=None, *, factors=None, **extra):
            if self.needs_factors:
                # The kernel's gradient from its factors, in place of the one that is handed in.
                (activation,), (tangent,) = factors.activations, factors.tangents
                grads = {**grads, "w": activation.T @ tangent}
            return jax.tree.map(lambda g: -jnp.exp(phi) * g, grads), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_task():
    """Linear regression on 64 examples; the labels of the split ``valid`` are shifted by 100."""
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    y = x @ np.array([[1.0], [2.0], [-1.0]], np.float32)

    def sample(key, split):
        index = jax.random.randint(key, (16,), 0, 64)
        return jax.tree.map(lambda leaf: leaf[index], split)

    return Task(
        name="toy",
        horizon=12,
        batch_size=16,
        loss_cap=1e6,
        data={"train": {"x": x, "y": y}, "valid": {"x": x, "y": y + 100}, "test": {"x": x, "y": y}},
        init=lambda key: {"w": jax.random.normal(key, (3, 1)), "b": jnp.zeros(1)},
        loss=lambda params, batch: jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2),
        sample=sample,
    )


@pytest.mark.parametrize("needs_factors", [False, True])
def test_a_step_is_a_training_step(needs_factors):
    task, phi, key = make_task(), jnp.log(0.1), jax.random.key(1)
    problem = TrainingProblem(task, LogRate(needs_factors))
    state = problem.init(phi, problem.splits(), jax.random.key(0))
    new, loss = problem.step(phi, state, problem.splits(), key)
    batch = task.sample(jax.random.split(key)[0], task.data["train"])
    expected, grads = jax.value_and_grad(task.loss)(state.params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(
        lambda a, p, g: np.testing.assert_allclose(a, p - 0.1 * g, rtol=1e-4, atol=1e-6),
        new.params,
        state.params,
        grads,
    )


def test_validation_loss_is_on_data_that_is_not_trained_on():
    task, phi = make_task(), jnp.log(0.1)
    train, valid = (TrainingProblem(task, LogRate(), meta_loss=m) for m in ("train", "validation"))
    assert set(train.splits()) == {"train"}
    state = valid.init(phi, valid.splits(), jax.random.key(0))
    after_train, loss = train.step(phi, state, valid.splits(), jax.random.key(1))
    after_valid, valid_loss = valid.step(phi, state, valid.splits(), jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, after_train, after_valid)
    assert loss < 100 < valid_loss


def test_horizon_may_be_overridden():
    assert TrainingProblem(make_task(), LogRate()).horizon == 12
    assert TrainingProblem(make_task(), LogRate(), steps=6).horizon == 6
    with pytest.raises(ValueError, match="unknown meta-loss 'test'"):
        TrainingProblem(make_task(), LogRate(), meta_loss="test")


@pytest.mark.parametrize("needs_factors", [False, True])
@pytest.mark.parametrize("estimator", [PES, Truncated])
def test_meta_training_raises_a_learning_rate_that_is_too_small(estimator, needs_factors):
    problem = TrainingProblem(make_task(), LogRate(needs_factors))
    data, phi, meta = problem.splits(), jnp.log(1e-3), optax.adam(0.1)
    estimator = estimator(problem, 4, truncation=4)

    def meta_step(carry, key):
        phi, state, opt_state = carry
        state, result = estimator.estimate(phi, state, data, key)
        update, opt_state = meta.update(result.gradient, opt_state)
        return (optax.apply_updates(phi, update), state, opt_state), result.loss

    @jax.jit
    def meta_train(phi):
        carry = (phi, estimator.init(phi, data, jax.random.key(0)), meta.init(phi))
        return jax.lax.scan(meta_step, carry, jax.random.split(jax.random.key(1), 50))

    (phi, _, _), losses = meta_train(phi)
    assert phi > jnp.log(1e-2)
    assert losses[-5:].mean() < 0.7 * losses[5:10].mean()
