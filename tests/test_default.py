"""The shipped generalists on models they have not been meta-trained on: they diverge nowhere that Adam does not."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest
from sklearn.datasets import load_digits

import gmn_lopt
from gmn_lopt.evaluation.training import Candidate, training_curves
from gmn_lopt.meta.task import task_structure
from gmn_lopt.optimizers.horizon import PEAK, POWER, WARMUP, WEIGHT_DECAY
from gmn_lopt.optimizers.saved import load_learned, make_optimizer
from gmn_lopt.tasks import load_task

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES, LABELS = jnp.asarray(IMAGES / 16, jnp.float32), jnp.asarray(LABELS)
STEPS = 200


def dense(key, inputs, outputs):
    return {"kernel": jax.random.normal(key, (inputs, outputs)) / math.sqrt(inputs), "bias": jnp.zeros(outputs)}


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp(*widths, activation=jax.nn.relu, scale=1.0, inputs=1.0):
    keys = jax.random.split(jax.random.key(0), len(widths) - 1)
    params = [dense(key, a, b) for key, a, b in zip(keys, widths, widths[1:])]
    params = [p | {"kernel": scale * p["kernel"]} for p in params]

    def loss(params, x, y):
        x = inputs * x
        for i, p in enumerate(params):
            x = (activation(x) if i else x) @ p["kernel"] + p["bias"]
        return cross_entropy(x, y)

    return params, loss


def regression():
    """Least squares whose columns differ a thousandfold in scale."""
    scales = jnp.logspace(-3, 0, 64)

    def loss(params, x, y):
        return jnp.mean((x * scales @ params["w"] - y[:, None]) ** 2)

    return {"w": jnp.zeros((64, 1))}, loss


def recurrent():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"read": dense(keys[0], 8, 16), "hold": dense(keys[1], 16, 16), "out": dense(keys[2], 16, 10)}

    def loss(params, x, y):
        def step(h, row):
            return jnp.tanh(
                row @ params["read"]["kernel"] + h @ params["hold"]["kernel"] + params["hold"]["bias"]
            ), None

        rows = x.reshape(-1, 8, 8).transpose(1, 0, 2)
        h, _ = jax.lax.scan(step, jnp.zeros((len(x), 16)), rows)
        return cross_entropy(h @ params["out"]["kernel"] + params["out"]["bias"], y)

    return params, loss


def convolution():
    """A convolution has no factors: its kernel is optimised through per-parameter features alone."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"filters": jax.random.normal(keys[0], (8, 1, 3, 3)) / 3, "out": dense(keys[1], 8 * 36, 10)}

    def loss(params, x, y):
        x = jax.lax.conv(x.reshape(-1, 1, 8, 8), params["filters"], (1, 1), "VALID")
        x = jax.nn.relu(x).reshape(len(x), -1)
        return cross_entropy(x @ params["out"]["kernel"] + params["out"]["bias"], y)

    return params, loss


PROBLEMS = {
    "deep": lambda: mlp(64, *[24] * 4, 10, activation=jnp.tanh),
    "large weights": lambda: mlp(64, 32, 32, 10, scale=3.0),
    "large inputs": lambda: mlp(64, 32, 10, inputs=100.0),
    "small inputs": lambda: mlp(64, 32, 10, inputs=0.01),
    "no hidden layer": lambda: mlp(64, 10),
    "regression": regression,
    "recurrent": recurrent,
    "convolution": convolution,
}


def train(params, loss, make):
    """The losses of a run, in one scan."""
    structure = gmn_lopt.analyze(loss, params, IMAGES[:32], LABELS[:32])
    tx = make(structure)

    def step(carry, key):
        params, state = carry
        index = jax.random.randint(key, (32,), 0, len(LABELS))
        value, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, IMAGES[index], LABELS[index])
        updates, state = tx.update(grads, state, params, factors=factors)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(1), STEPS)
    return jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), keys)[1])(params)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_safe_where_adam_at_its_usual_rate_is(problem):
    params, loss = PROBLEMS[problem]()
    adam = train(params, loss, lambda _: optax.with_extra_args_support(optax.adam(1e-3)))
    assert jnp.isfinite(adam).all() and adam[-20:].mean() < adam[:5].mean(), "Adam goes wrong itself: no such problem"
    for name in ("default", "default+celo"):
        losses = train(params, loss, lambda structure, name=name: gmn_lopt.load(name, structure))
        assert jnp.isfinite(losses).all(), name
        assert losses[-20:].mean() < 1.05 * losses[:5].mean(), name


@pytest.mark.parametrize("name", ["default", "default+celo"])
def test_examples_that_are_separated_stay_so(name):
    """All gradients agree then, step after step: a step size that follows them must not grow without end."""
    task = load_task("tabular_mlp", data="wine")
    lopt, phi = load_learned(name, task_structure(task))
    candidate = Candidate(name, "", "", lopt.optimizer, phi, lopt.needs_factors)
    curves = training_curves(task, candidate, range(5), 50)
    assert curves.train_loss[:, 6:].max() < 0.01 and curves.test_loss[:, -1].max() < 0.5


@pytest.mark.parametrize("name", ["default", "default+celo"])
def test_learning_rate_schedule_and_weight_decay(name):
    """As with AdamW: a schedule multiplies the steps, and weights shrink by rate times decay."""
    params, loss = mlp(64, 12, 10)
    structure = gmn_lopt.analyze(loss, params, IMAGES[:32], LABELS[:32])
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, IMAGES[:32], LABELS[:32])

    def first(**settings):
        tx = gmn_lopt.load(name, structure, **settings)
        return jnp.concatenate(
            [u.ravel() for u in jax.tree.leaves(tx.update(grads, tx.init(params), params, factors=factors)[0])]
        )

    plain = first(learning_rate=0.01)
    weights = jnp.concatenate([p.ravel() for p in jax.tree.leaves(params)])
    schedule = optax.warmup_cosine_decay_schedule(0.02, 0.04, 10, 100)
    assert jnp.allclose(first(learning_rate=schedule), 2 * plain, rtol=1e-4, atol=1e-7)
    assert jnp.allclose(first(learning_rate=0.01, weight_decay=0.1), plain - 0.001 * weights, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["default", "default+celo"])
def test_with_a_known_number_of_steps_it_warms_up_falls_to_nothing_and_decays_weights(name):
    params, loss = mlp(64, 12, 10)
    structure = gmn_lopt.analyze(loss, params, IMAGES[:32], LABELS[:32])
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, IMAGES[:32], LABELS[:32])

    def first(start=0, **settings):
        tx = gmn_lopt.load(name, structure, **settings)
        state = tx.init(params)._replace(step=jnp.int32(start))
        return jnp.concatenate(
            [u.ravel() for u in jax.tree.leaves(tx.update(grads, state, params, factors=factors)[0])]
        )

    def given(start, rate, **settings):
        return first(start, learning_rate=rate, weight_decay=WEIGHT_DECAY, **settings)

    half = WARMUP + (1 - WARMUP) / 2  # of the steps: there the cosine is half way down
    for start, rate in ((0, PEAK / 10), (9, PEAK), (round(200 * half) - 1, PEAK * 0.5**POWER), (199, 0.0), (999, 0.0)):
        assert jnp.allclose(first(start, total_steps=199), given(start, rate), rtol=1e-2, atol=1e-8), start
    assert jnp.allclose(first(9, total_steps=199, learning_rate=0.5), given(9, 0.5), rtol=1e-3)
    undecayed = first(9, total_steps=199, weight_decay=0.0)
    assert jnp.allclose(undecayed, first(9, learning_rate=PEAK), rtol=1e-3, atol=1e-8)
    for wrong in (0, -5, 2.5, True, "many", 10**12):
        with pytest.raises(gmn_lopt.SerializationError, match=r"total_steps must be a whole number of at least 1"):
            make_optimizer(*load_learned(name, structure), {"total_steps": wrong}, name)
    with pytest.raises(gmn_lopt.SerializationError, match="total_steps or a schedule"):
        gmn_lopt.load(name, structure, total_steps=10, learning_rate=optax.constant_schedule(0.1))
