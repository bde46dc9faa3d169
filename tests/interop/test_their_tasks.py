"""Tasks of learned_optimization as ours: against their own loss, and per-example Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmn_lopt import recipe, value_grad_and_factors
from gmn_lopt.cli import eval as eval_
from gmn_lopt.cli import meta_train
from gmn_lopt.evaluation.training import mean_loss
from gmn_lopt.interop.learned_optimization import to_task
from gmn_lopt.meta import PES, TrainingProblem
from gmn_lopt.meta.task import task_structure
from gmn_lopt.tasks import load_task, task_module
from interop import stubs

HAIKU = {task.__name__: task for task in (stubs.MLP, stubs.Conv, stubs.Autoencoder, stubs.RNN)}


def named(name):
    return f"learned_optimization:interop.stubs:{name}"


@pytest.mark.parametrize("name", HAIKU)
def test_loss_and_gradient_are_theirs(name):
    theirs = HAIKU[name]()
    task = to_task(theirs, batches=10)
    batch = task.sample(jax.random.key(1), task.data["train"])
    params, state = theirs.init_with_state(jax.random.key_data(jax.random.key(0)))

    def loss(params):
        return theirs.loss_with_state(params, state, batch["key"][0], batch["data"])[0]

    for one, other in zip(jax.tree.leaves(task.init(jax.random.key(0))), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)
    value, grads, factors = value_grad_and_factors(task.loss)(params, batch)
    np.testing.assert_array_equal(task.loss(params, batch), loss(params))
    np.testing.assert_allclose(value, loss(params), rtol=1e-6)
    expected = jax.tree.leaves(jax.grad(loss)(params))
    structure = task_structure(task)
    assert sum(p.status == "factored" for p in structure.parameters) >= 2
    rebuilt = jax.tree.leaves(structure.reconstruct(factors, params, batch))
    for p, dense, got, want in zip(structure.parameters, jax.tree.leaves(grads), rebuilt, expected, strict=True):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(dense, want, atol=1e-5 * scale)
        if p.status == "factored":
            np.testing.assert_allclose(got, want, atol=1e-5 * scale)


def test_factors_are_per_example_gradients_of_their_loss():
    theirs = stubs.MLP()
    task = to_task(theirs, batches=10)
    batch, params = task.sample(jax.random.key(1), task.data["train"]), task.init(jax.random.key(0))

    def one_example(params, data):
        return theirs.loss(params, batch["key"][0], jax.tree.map(lambda x: x[None], data))

    jacobians = jax.tree.leaves(jax.vmap(jax.grad(one_example), in_axes=(None, 0))(params, batch["data"]))
    factors = value_grad_and_factors(task.loss)(params, batch)[2]
    layers = task_structure(task).layers
    assert len(layers) == 2
    for layer in layers:
        a, g = factors.activations[layer.activation], factors.tangents[layer.tangent] * task.batch_size
        np.testing.assert_allclose(jnp.einsum("si,so->sio", a, g), jacobians[layer.kernel], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(g, jacobians[layer.bias], rtol=1e-4, atol=1e-6)


def test_the_test_loss_is_the_mean_over_their_batches():
    theirs = stubs.RNN()  # a mean over what is not masked: no mean over examples
    task = to_task(theirs, batches=30)
    params, test = task.init(jax.random.key(0)), task.data["test"]
    parts = [jax.tree.map(lambda x, i=i: jnp.asarray(x[8 * i : 8 * i + 8]), test) for i in range(3)]
    losses = [theirs.loss(params, part["key"][0], part["data"]) for part in parts]
    np.testing.assert_allclose(mean_loss(task.loss, params, test, task.at_once), np.mean(losses), rtol=1e-6)
    assert len(np.unique(test["key"], axis=0)) == 3  # a key for each batch
    assert "24 examples" in task.test_subset


def test_the_same_data_each_time():
    before = np.random.get_state()[1].copy()
    first = to_task(stubs.MLP(), batches=10)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.seed(5)
    again = to_task(stubs.MLP(), batches=10)
    for one, other in zip(jax.tree.leaves(first.data), jax.tree.leaves(again.data), strict=True):
        np.testing.assert_array_equal(one, other)
    pool = {bytes(image) for image in np.asarray(stubs.images().examples["image"][:40])}
    drawn = {bytes(image) for image in first.data["train"]["data"]["image"]}
    assert drawn == pool  # 80 examples of 40
    assert not drawn & {bytes(image) for image in first.data["test"]["data"]["image"]}


def test_batches_and_keys_are_drawn():
    task = to_task(stubs.MLP(dropout=0.5), batches=10)
    one, other = (task.sample(jax.random.key(i), task.data["train"]) for i in range(2))
    assert (one["key"] != other["key"]).any() and (one["data"]["image"] != other["data"]["image"]).any()
    params = task.init(jax.random.key(0))
    mixed = {"data": one["data"], "key": other["key"]}
    assert task.loss(params, one) == task.loss(params, one) != task.loss(params, mixed)


def test_without_data_the_key_alone_is_drawn():
    task = to_task(stubs.Quadratic(noise=1.0))
    batches = [task.sample(jax.random.key(i), task.data["train"]) for i in range(2)]
    losses = [float(task.loss(jnp.zeros(5), batch)) for batch in batches]
    expected = [float(jax.random.normal(batch["key"][0])) for batch in batches]
    assert losses == expected and losses[0] != losses[1]


def test_caps():
    assert to_task(stubs.MLP()).loss_cap == pytest.approx(1.5 * np.log(stubs.CLASSES))
    quadratic = to_task(stubs.Quadratic())  # no bound: ten times the loss at the start, 5 on average
    assert 20 < quadratic.loss_cap < 100
    theirs = stubs.Quadratic()
    theirs.normalizer = lambda loss: jnp.minimum(loss, 1.0) * 10  # other units
    assert to_task(theirs).loss_cap == quadratic.loss_cap


def test_a_family_gives_one_of_its_tasks():
    tasks = [to_task(stubs.Family(), seed=seed) for seed in (0, 0, 1)]
    losses = [float(task.loss(jnp.zeros(5), task.data["test"])) for task in tasks]
    target = stubs.Family().sample(jax.random.key_data(jax.random.key(1)))
    assert losses[0] == losses[1] != losses[2] == float(jnp.sum(target**2))


def test_settings_go_where_they_belong():
    task = load_task(named("MLP"), hidden=(4, 4), batch_size=4, horizon=30, batches=20)
    assert (task.name, task.horizon, task.batch_size) == ("MLP", 30, 4)
    assert len(task.data["train"]["key"]) == 80 and len(jax.tree.leaves(task.init(jax.random.key(0)))) == 6
    assert load_task(named("QUADRATIC")).name == "QUADRATIC"  # an object, not what makes one
    assert task_module(named("MLP")) == "interop.stubs"


@pytest.mark.parametrize(
    ("spec", "settings", "says"),
    [
        ("learned_optimization:interop.stubs", {}, "write learned_optimization:MODULE:NAME"),
        ("learned_optimization::MLP", {}, "write learned_optimization:MODULE:NAME"),
        ("learned_optimization:nowhere.at_all:MLP", {}, "No module named 'nowhere'; docs/learned_optimization.md"),
        ("learned_optimization:subprocess:getoutput", {"cmd": "true"}, "subprocess is of Python's own library"),
        (named("MPL"), {}, "module interop.stubs has no MPL; did you mean MLP?"),
        (named("MLP"), {"width": 3}, "MLP cannot be made: TypeError: MLP() got an unexpected keyword argument 'width'"),
        (named("QUADRATIC"), {"dim": 3}, "QUADRATIC is an object, made already"),
        (named("broken"), {}, "broken cannot be made: RuntimeError: no such data"),
        (named("images"), {}, "Datasets is neither a Task (init, loss) nor a TaskFamily"),
        (named("NUMBER"), {}, "int is neither a Task"),
        (named("Counting"), {}, "Counting: its loss depends on a model state"),
        (named("Warmed"), {}, "Warmed: its loss depends on a model state"),
        (named("no_common_axis"), {}, "no common first axis of examples"),
        (named("scalars"), {}, "no common first axis of examples"),
        (named("other_batch"), {}, "but abstract_batch says image float32[8, 9, 9, 1]"),
        (named("different_sizes"), {}, "batches of different sizes: train 8, outer_valid 8, test 6"),
        (named("short"), {}, "the split train ends after 3 batches; give batches=3"),
        (named("MLP"), {"horizon": 0}, "horizon must be a whole number of at least 1"),
        (named("MLP"), {"batches": 2.5}, "batches must be a whole number"),
        (named("Family"), {"seed": "x"}, "seed must be a whole number"),
    ],
)
def test_bad_tasks_end_in_one_line(spec, settings, says):
    with pytest.raises(ValueError) as error:
        load_task(spec, **settings)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "recipe_name"), [("MLP", "ds+gmn"), ("RNN", "ds")])
def test_meta_training_on_them(name, recipe_name):
    task = to_task(HAIKU[name](), horizon=4, batches=10)
    lopt = recipe(recipe_name, task_structure(task))
    problem = TrainingProblem(task, lopt, meta_loss="validation")
    estimator, phi = PES(problem, pairs=2, truncation=2), lopt.init(jax.random.key(0))
    data = problem.splits()
    state = jax.jit(estimator.init)(phi, data, jax.random.key(1))
    state, estimate = jax.jit(estimator.estimate)(phi, state, data, jax.random.key(2))
    leaves = jax.tree.leaves(estimate.gradient)
    assert all(jnp.isfinite(x).all() for x in leaves) and any(x.any() for x in leaves)


def test_the_commands_take_them(tmp_path, capsys):
    spec, out = named("Quadratic") + ":dim=3,horizon=4", str(tmp_path / "run")
    command = ["--task", spec, "--out", out, "--optimizer", "sgdm", "--stage", "pes:meta_steps=1,truncation=2,pairs=2"]
    assert meta_train.main(meta_train.from_command_line(None, command))
    optimizers = (out, f"{named('SGD')}:learning_rate=0.1")
    report = eval_.main(
        eval_.Config(
            task=spec,
            out=tmp_path / "report",
            optimizer=optimizers,
            baseline=("adamw",),
            seeds=1,
            trials_at_once=3,
            timing_rounds=1,
        )
    )
    assert [row["name"] for row in report["optimizers"]] == ["adamw", "run", "SGD(learning_rate=0.1)"]
    assert "Quadratic" in (tmp_path / "report" / "report.md").read_text()
