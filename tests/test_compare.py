"""Optimizers compared from Python, on a task of a user."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import gmn_lopt
from gmn_lopt.evaluation import compare
from gmn_lopt.meta.task import Task, task_structure
from gmn_lopt.util.errors import UsageError

FEW: dict = {"seeds": 1, "baseline": "adamw", "trials_at_once": 3, "timing_rounds": 1}
SPLITS = ("train", "valid", "test")


def by_hand(**changes) -> Task:
    """A task of a user: data in memory, functions of which one is compiled already and one has no file."""
    x = np.random.default_rng(0).normal(size=(96, 4)).astype(np.float32)
    examples = {"x": x, "y": np.tanh(x).sum(1, keepdims=True)}
    names: dict = {"jax": jax, "jnp": jnp}
    exec("def init(key): return {'w': jax.random.normal(key, (4, 8)), 'v': jnp.ones((8, 1)) / 8}", names)
    fields = {
        "name": "by hand",
        "horizon": 10,
        "batch_size": 8,
        "loss_cap": 100.0,
        "data": {name: {k: v[i : i + 32] for k, v in examples.items()} for i, name in zip((0, 32, 64), SPLITS)},
        "init": names["init"],
        "loss": jax.jit(lambda p, batch: jnp.mean((jnp.tanh(batch["x"] @ p["w"]) @ p["v"] - batch["y"]) ** 2)),
        "sample": lambda key, split: jax.tree.map(lambda a: a[jax.random.randint(key, (8,), 0, 32)], split),
    }
    return Task(**(fields | changes))


def test_compare_takes_saved_optimizers_and_transformations(tmp_path):
    task = by_hand()
    structure = task_structure(task)
    lopt = gmn_lopt.recipe("ds", structure)
    saved = str(tmp_path / "saved")
    gmn_lopt.save(saved, lopt, lopt.init(jax.random.key(0)))
    optimizers = {
        "saved": saved,
        "with factors": optax.chain(optax.clip_by_global_norm(1e3), gmn_lopt.load(saved, structure)),
        "of optax": "optax:sgd:learning_rate=0.05",
        "given": optax.sgd(0.05),
    }
    found = compare(task, optimizers, tmp_path / "out", **FEW)
    loss = {row["name"]: row["final_test_loss"]["mean"] for row in found.report["optimizers"]}
    assert list(loss) == ["adamw", *optimizers]
    assert loss["given"] == pytest.approx(loss["of optax"], rel=1e-5)
    assert loss["with factors"] == pytest.approx(loss["saved"], rel=1e-3) != pytest.approx(loss["given"], rel=1e-3)
    # Made anew, and told by what it computes: the same task goes on.
    again = compare(by_hand(), {"given": optax.sgd(0.1)}, tmp_path / "out", **FEW)
    assert again.report["optimizers"][1]["final_test_loss"]["mean"] != pytest.approx(loss["given"], rel=1e-3)
    with pytest.raises(UsageError, match=r"another configuration .task_file was"):
        compare(by_hand(loss=jax.jit(lambda p, batch: jnp.mean(batch["x"] @ p["w"]))), [], tmp_path / "out", **FEW)


@pytest.mark.parametrize(
    "task, optimizers, settings, message",
    [
        ("digits_mlp", ["default"], {}, "task must be a gmn_lopt.meta.Task, such as load_task makes, not a str"),
        ({}, "default", {}, "optimizers must be a list of names, or a dictionary of names and optimizers"),
        ({}, optax.sgd(0.1), {}, "optimizers must be a list of names, or a dictionary of names and optimizers"),
        ({}, [optax.sgd(0.1)], {}, "optimizer 'GradientTransformationExtraArgs': a transformation needs a name"),
        ({}, {"mine": 0.1}, {}, "optimizer 'mine': neither a name nor an optax transformation"),
        ({}, {"adamw": optax.sgd(0.1)}, {}, "optimizer 'adamw': the name 'adamw' is taken"),
        ({}, ["defualt"], {}, "optimizer 'defualt': "),
        ({}, [], {"seed": 3}, "there is no setting 'seed'; did you mean seeds?"),
        ({}, [], {"seeds": 1.5}, "seeds must be a whole number, not 1.5"),
        ({}, [], {"trials_at_once": 0}, "trials_at_once must be at least 1"),
        ({}, [], {"split": "train"}, "split must be test or valid, not 'train'"),
        ({}, [], {"baseline": "adam"}, "baseline 'adam': there are adamw"),
        ({"data": {"train": {"x": np.ones((4, 4))}}}, [], {}, r"task by hand: data\['valid'\] must be arrays"),
        ({"loss": lambda p, batch: batch["x"] @ p["w"]}, [], {}, "task by hand: the loss must be a scalar, not"),
        ({"loss": lambda p, batch: batch["z"]}, [], {}, "task by hand: KeyError: 'z'"),
    ],
)
def test_what_compare_cannot_do_is_said_in_one_line(task, optimizers, settings, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' check of types would come first
    with pytest.raises(UsageError, match=f"^{message}"):
        compare(by_hand(**task) if isinstance(task, dict) else task, optimizers, **settings)
