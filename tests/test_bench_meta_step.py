"""The benchmark of the meta-step: its reference makes the library's updates, its table is filled."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from optimizing import analyzed, lively, mlp, play, record, relative_difference

from bench import meta_step
from bench.measure import matrix_flops, synthetic_task
from bench.straightforward import Straightforward
from gmn_lopt.networks.gradmetanet import GradMetaNetConfig
from gmn_lopt.networks.pointwise import PointwiseMLP
from gmn_lopt.optimizers.directions import Denoised
from gmn_lopt.optimizers.recipes import RECIPES, Recipe
from gmn_lopt.optimizers.residual import Residual
from gmn_lopt.optimizers.set_reader import SetReader
from gmn_lopt.util.errors import UsageError

SMALL = SetReader(GradMetaNetConfig(width=6, set_layers=2, product_width=5), max_set_size=7)
MODEL = mlp(5, 7, 4)


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPES["ds"],
        Recipe(residual=Residual(gradmetanet=SetReader(GradMetaNetConfig(6, product_width=5, neuron_layers=2)))),
        Recipe(Denoised(), Residual(network=PointwiseMLP(8, 2), gradmetanet=SMALL)),
    ],
)
def test_straightforward_makes_the_same_updates(recipe):
    lopt = recipe.build(analyzed(MODEL))
    phi, recorded = lively(lopt), record(MODEL)
    tx, plain = lopt.optimizer(phi), Straightforward(lopt).optimizer(phi)
    state = plain.init(recorded[0][0])
    update = jax.jit(plain.update)
    for expected, (params, grads, factors) in zip(play(lopt, phi, recorded), recorded):
        step, state = update(grads, state, params, factors=factors)
        assert relative_difference(step, expected) < 1e-4
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(recorded[0][0]))


@pytest.mark.parametrize(
    ("recipe", "says"), [("default+celo", "additive"), ("unf", "PointwiseMLP"), ("ds+gmn++", "for GradMetaNet")]
)
def test_straightforward_refuses_what_it_does_not_do(recipe, says):
    with pytest.raises(ValueError, match=says):
        Straightforward(RECIPES[recipe].build(analyzed(MODEL)))


def test_flops_count_every_turn_of_a_loop():
    x, w = jnp.ones((3, 4)), jnp.ones((4, 4))
    loop = lambda x, w: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]  # noqa: E731
    assert matrix_flops(loop, x, w) == 5 * 2 * 3 * 4 * 4
    assert matrix_flops(jax.vmap(loop, in_axes=(0, None)), jnp.ones((7, 3, 4)), w) == 7 * 5 * 2 * 3 * 4 * 4
    # Forward, and two products in each step backwards; recomputing each step is one more.
    assert matrix_flops(jax.grad(lambda w: loop(x, w).sum()), w) == 3 * 5 * 2 * 3 * 4 * 4
    assert matrix_flops(jnp.linalg.cholesky, jnp.eye(6)) == 6**3 / 3


def test_tasks_on_random_data_need_no_data_set():
    for name, shape in (("cifar100_mlp", (128, 192)), ("lm1b_transformer", (8, 8))):
        task = synthetic_task(name)
        batch = task.sample(jax.random.key(0), task.data["train"])
        assert jax.tree.leaves(batch)[0].shape == shape
        assert jnp.isfinite(task.loss(task.init(jax.random.key(0)), batch))


def test_tables(tmp_path, capsys):
    config = meta_step.Config(("fashion_mnist_mlp",), ("truncated",), ("ds",), baseline=True)
    result = meta_step.main(replace(config, pairs=1, truncation=1, repeats=1, out=tmp_path))
    assert json.loads((tmp_path / "meta_step.json").read_text()) == result
    plain, library = result["meta_steps"]
    assert (plain["form"], library["form"]) == ("straightforward", "library")
    assert library["ratio"] == pytest.approx(library["inner_steps_per_s"] / plain["inner_steps_per_s"])
    # What both multiply is the same but for the time features, and nearly all of it is the network's, three times.
    entries, network = 64 * 32 + 32 + 32 * 10 + 10, 8 * 32 + 2 * 32 * 32 + 32 * 1
    flops = library["flops_per_s"] * library["meta_step_s"][0]
    assert 2 * entries * network < flops < 4 * 2 * entries * network + 6e6
    adam, learned = result["training_steps"]
    assert (adam["relative"], learned["relative"] < 1) == (1.0, True)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| fashion_mnist_mlp")]
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizers": ("rnn",)}, "--optimizers rnn: unknown recipe 'rnn'"),
        ({"optimizers": ("ds", "unf"), "baseline": True}, "--optimizers ds unf: only for"),
        ({"pairs": 0}, "--pairs must be at least 1"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(changes, says):
    with pytest.raises(UsageError, match=says):
        meta_step.main(meta_step.Config(("fashion_mnist_mlp",), **changes))
