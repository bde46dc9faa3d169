"""The adapters on learned_optimization itself; ``make interop`` installs it and runs this."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gmn_lopt import recipe
from gmn_lopt.evaluation.sources import find_candidates
from gmn_lopt.evaluation.training import training_curves
from gmn_lopt.interop.learned_optimization import LearnedOptimizer, Optimizer, to_task
from gmn_lopt.interop.learned_optimization.named import make
from gmn_lopt.meta.task import task_structure
from gmn_lopt.tasks import load_task
from interop import stubs

pytest.importorskip("learned_optimization", reason="learned_optimization is not installed: make interop")


def named(module, name):
    return f"learned_optimization:learned_optimization.{module}:{name}"


def module(name):
    make(named("tasks.quadratics", "QuadraticTask"), {})  # puts back what JAX no longer has
    return importlib.import_module(f"learned_optimization.{name}")


def image_datasets(batch_size=16):
    """Their class, with images that are drawn."""
    own, base = stubs.images(batch_size), module("tasks.datasets.base")
    splits = [own.split(name) for name in ("train", "inner_valid", "outer_valid", "test")]
    return base.Datasets(*splits, extra_info={"num_classes": stubs.CLASSES}, abstract_batch=own.abstract_batch)


def image_mlp():
    return module("tasks.fixed.image_mlp")._MLPImageTask(image_datasets(), [16])


def image_conv():
    conv, hk = module("tasks.fixed.conv"), module("tasks.rnn").hk
    norm = lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=True)  # noqa: E731
    function = conv._cross_entropy_pool_loss([4, 4], jax.nn.relu, num_classes=stubs.CLASSES, norm_fn=norm)
    return conv._ConvTask(function, image_datasets())


def autoencoder():
    fixed = module("tasks.fixed.image_mlp_ae")
    return fixed._make_task(fixed._fc_ae_loss_fn([8], jax.nn.relu), image_datasets())


@pytest.mark.parametrize("build", [image_mlp, image_conv, autoencoder])
def test_their_tasks(build):
    theirs = build()
    task = to_task(theirs, horizon=30, batches=2)
    params, state = theirs.init_with_state(jax.random.PRNGKey(0))
    batch = task.sample(jax.random.key(1), task.data["train"])
    expected, _ = theirs.loss_with_state(params, state, batch["key"][0], batch["data"])
    np.testing.assert_allclose(task.loss(params, batch), expected, rtol=1e-6)
    (candidate,) = find_candidates(["default"], task)
    curves = training_curves(task, candidate, [0], 10)
    assert curves.train_loss[0, -1] < 0.98 * curves.train_loss[0, 0]  # of few examples, drawn again and again


def test_caps_of_their_normalizers():
    for build in (image_mlp, image_conv):
        assert to_task(build(), batches=1).loss_cap == pytest.approx(1.5 * np.log(stubs.CLASSES))


@pytest.mark.parametrize("name", ["QuadraticTask", "BatchQuadraticTask", "SumQuadraticTask", "FixedDimQuadraticFamily"])
def test_quadratics(name):
    task = load_task(named("tasks.quadratics", name), horizon=20)
    (candidate,) = find_candidates(["optax:sgd:learning_rate=0.1"], task)
    curves = training_curves(task, candidate, [0], 10)
    assert curves.test_loss[0, -1] < 0.05 * curves.test_loss[0, 0]


def test_a_task_of_scalars_is_refused():
    with pytest.raises(ValueError, match="no common first axis of examples"):
        load_task(named("tasks.quadratics", "FixedDimQuadraticFamilyData"), dim=3)


@pytest.mark.parametrize(
    ("name", "own"),
    [("SGD", optax.sgd(0.02)), ("SGDM", optax.sgd(0.02, 0.9)), ("Adam", optax.adam(0.02, eps_root=1e-8))],
)
def test_their_optimizers(name, own):
    task = to_task(image_mlp(), horizon=20, batches=4)
    specs = [f"{named('optimizers.base', name)}:learning_rate=0.02", "optax:sgd:learning_rate=1"]
    theirs, other = find_candidates(specs, task)
    other = type(other)(**{**vars(other), "make": lambda _: own})
    one, two = (training_curves(task, candidate, [0, 1], 5).test_loss for candidate in (theirs, other))
    np.testing.assert_allclose(one, two, rtol=1e-4)


@pytest.mark.parametrize(
    ("where", "name"), [("learned_optimizers.mlp_lopt", "MLPLOpt"), ("learned_optimizers.nn_adam", "NNAdam")]
)
def test_their_learned_optimizers_with_weights(tmp_path, where, name):
    checkpoints, learned = module("checkpoints"), getattr(module(where), name)()
    theta = learned.init(jax.random.PRNGKey(3))
    checkpoints.save_state(str(tmp_path / "theta"), theta)
    task = to_task(image_mlp(), horizon=6, batches=4)
    (candidate,) = find_candidates([f"{named(where, name)}:weights={str(tmp_path / 'theta')!r}"], task)
    curves = training_curves(task, candidate, [0], 1)

    init, batches = jax.random.split(jax.random.key(0))
    opt, losses = learned.opt_fn(theta), []
    state = opt.init(task.init(init), num_steps=6)
    for t in range(6):
        batch = task.sample(jax.random.fold_in(batches, t), task.data["train"])
        value, grad = jax.value_and_grad(task.loss)(opt.get_params(state), batch)
        state = opt.update(state, grad, loss=value)
        losses.append(value)
    np.testing.assert_allclose(curves.train_loss[0], losses, rtol=1e-4)


def test_our_optimizer_where_theirs_stands():
    """Both classes of theirs and ours, by the same calls, on the same gradients."""
    base, task = module("optimizers.base"), to_task(image_mlp(), batches=4)
    params, results = task.init(jax.random.key(0)), []
    for opt in (base.OptaxOptimizer(optax.adam(0.01)), Optimizer(optax.adam(0.01))):
        state = opt.init(params, None, num_steps=5, key=jax.random.PRNGKey(0))
        for i in range(5):
            p, s = opt.get_params_state(state)
            value, grad = jax.value_and_grad(task.loss)(p, task.sample(jax.random.key(i), task.data["train"]))
            state = opt.update(state, grad, loss=value, model_state=s, key=jax.random.PRNGKey(i))
        results.append(opt.get_params(opt.set_params(state, opt.get_params(state))))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_our_learned_optimizer_in_their_truncated_unroll():
    """Of version 0.0.1; the current one takes TruncatedStep."""
    common = module("outer_trainers.common")
    if not hasattr(common, "truncated_unroll") or not hasattr(common, "init_truncation_state"):
        pytest.skip("this version unrolls truncated steps")
    schedule = module("outer_trainers.truncation_schedule").ConstantTruncationSchedule(10)
    family = module("tasks.base").single_task_to_family(image_mlp())
    task = to_task(family, batches=4)
    learned = LearnedOptimizer(recipe("ds", task_structure(task)))
    theta, keys = learned.init(jax.random.key(0)), jax.random.split(jax.random.PRNGKey(1), 3)
    state = common.init_truncation_state(family, learned, schedule, theta, None, keys)
    batch = jax.tree.map(lambda x: jnp.asarray(x[:16]), task.data["train"]["data"])
    datas = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, 3, *x.shape)), batch)  # one batch, again and again
    args = (family, learned, schedule, 3, 8, False, False, False, theta, jax.random.PRNGKey(2), state, datas, None)
    (state, out), _ = common.truncated_unroll(*args, with_summary=False)
    assert out.loss.shape == (8, 3) and bool((out.loss[-1] < out.loss[0]).all())
    np.testing.assert_array_equal(state.inner_opt_state.iteration, [8, 8, 8])


def test_every_parameter_of_their_network_has_factors():
    task = to_task(image_mlp(), batches=4)
    assert all(p.status == "factored" for p in task_structure(task).parameters)


def test_the_example(capsys):
    assert importlib.import_module("examples.learned_optimization_tasks").main(steps=40) < 1.0  # at the start: 2.3
    printed = capsys.readouterr().out
    assert "after 40 steps" in printed and "Adam(learning_rate=0.01)" in printed
