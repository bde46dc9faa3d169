"""An MLP on CIFAR-100 (fine labels) downsized to 8x8 pixels."""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from gmn_lopt.meta.task import Task
from tasks._images import load_images

FEATURES, CLASSES = 192, 100


def make(
    data_dir: str | None = None, *, hidden: tuple[int, ...] = (128,), batch_size: int = 128, horizon: int = 2000
) -> Task:
    """A 192-128-100 ReLU network.

    Args:
        data_dir: TensorFlow Datasets directory that holds ``cifar100``; see :func:`tasks._images.load_images`.
        hidden: widths of the hidden layers.
        batch_size: images per batch, drawn with replacement.
        horizon: number of training steps.
    """
    if min(*hidden, batch_size, horizon) < 1:
        raise ValueError("hidden, batch_size and horizon must be at least 1")
    widths = (FEATURES, *hidden, CLASSES)

    def init(key: jax.Array) -> PyTree:
        params = {}
        for i, layer_key in enumerate(jax.random.split(key, len(widths) - 1)):
            # lecun_normal: a truncated normal whose standard deviation, after truncation, is 1/sqrt(fan_in).
            kernel = jax.nn.initializers.lecun_normal()(layer_key, widths[i : i + 2])
            params[f"layer_{i}"] = {"kernel": kernel, "bias": jnp.zeros(widths[i + 1])}
        return params

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        x = batch["image"]
        for i in range(len(params)):
            x = jax.nn.relu(x) if i > 0 else x
            x = x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(x, batch["label"]).mean()

    def sample(key: jax.Array, split: PyTree) -> PyTree:
        index = jax.random.randint(key, (batch_size,), 0, len(split["label"]))
        return jax.tree.map(lambda array: jnp.take(array, index, axis=0, mode="clip"), split)

    data = load_images("cifar100", FEATURES, CLASSES, data_dir)
    return Task("cifar100_mlp", horizon, batch_size, 1.5 * math.log(CLASSES), data, init, loss, sample)
