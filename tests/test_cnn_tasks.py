"""The tasks of convolutional networks, on made-up images."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizing import relative_difference

import gmn_lopt
from gmn_lopt.meta.task import task_structure
from gmn_lopt.tasks import load_task

CHANNELS = {"fashion_mnist": 1, "cifar10": 3}
TASKS = {"fashion_mnist_cnn": {"widths": (4, 6)}, "cifar10_resnet": {"width": 4}}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Small made-up images for both data sets."""
    directory, rng = tmp_path_factory.mktemp("cache"), np.random.default_rng(0)
    for name, channels in CHANNELS.items():
        arrays = {}
        for split, size in {"train": 60, "test": 20}.items():
            arrays[f"{split}_image"] = rng.random((size, 16 * 16 * channels), np.float32)
            arrays[f"{split}_label"] = (np.arange(size) % 10).astype(np.int32)
        np.savez(directory / f"{name}-16x16.npz", **arrays, version=1, source="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GMN_LOPT_CACHE", str(directory))
        yield


@pytest.mark.parametrize("name", TASKS)
def test_task_trains_and_every_kernel_is_factored(name):
    task = load_task(name, batch_size=16, horizon=7, **TASKS[name])
    assert (task.name, task.horizon, task.batch_size) == (name, 7, 16)
    assert task.loss_cap == pytest.approx(1.5 * math.log(10)) and task.at_once == 1000
    params, structure = jax.jit(task.init)(jax.random.key(0)), task_structure(task)
    batch = task.sample(jax.random.key(1), task.data["train"])
    assert batch["image"].shape == (16, 16 * 16 * CHANNELS[name.removesuffix("_cnn").removesuffix("_resnet")])
    assert all(p.status == "factored" for p in structure.parameters if len(p.shape) > 1)

    @jax.jit
    def compute(params, batch):
        value, grads, factors = gmn_lopt.value_grad_and_factors(task.loss)(params, batch)
        descended = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
        return value, grads, structure.reconstruct(factors), task.loss(descended, batch)

    value, grads, rebuilt, after = compute(params, batch)
    assert 1 < value < 4 and after < value
    pairs = zip(structure.parameters, jax.tree.leaves(rebuilt), jax.tree.leaves(grads), strict=True)
    assert max(relative_difference(found, g) for p, found, g in pairs if p.status == "factored") < 1e-5
    assert jnp.isfinite(jax.jit(task.loss)(params, task.data["test"]))


def test_the_resnet_normalises_each_channel_by_the_batch():
    task = load_task("cifar10_resnet", width=4, batch_size=16)
    params, batch = jax.jit(task.init)(jax.random.key(0)), task.sample(jax.random.key(1), task.data["train"])
    scaled = params | {"Conv_0": {"kernel": 3 * params["Conv_0"]["kernel"]}}
    loss = jax.jit(task.loss)
    np.testing.assert_allclose(loss(scaled, batch), loss(params, batch), rtol=1e-3)


def test_what_is_not_possible():
    for name, settings, message in (
        ("fashion_mnist_cnn", {"widths": ()}, "widths must be"),
        ("fashion_mnist_cnn", {"widths": (4, 0)}, "widths must be"),
        ("cifar10_resnet", {"width": 0}, "width must be"),
        ("cifar10_resnet", {"batch_size": 0}, "batch_size and horizon"),
    ):
        with pytest.raises(ValueError, match=message):
            load_task(name, **settings)
