"""What the tasks of convolutional networks share: a flax module on images of 16x16 pixels, as a classifier."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from gmn_lopt.meta.task import Task
from gmn_lopt.tasks.data import Dataset, batches
from gmn_lopt.tasks.data.images import LARGE

AT_ONCE = 1000


def make_cnn(
    name: str, dataset: Dataset, model: nn.Module, data_dir: str | None, *, batch_size: int, horizon: int
) -> Task:
    """A task of classifying images by cross-entropy.

    Args:
        name: the task's name.
        dataset: the images.
        model: from images ``[batch, height, width, channels]`` to logits, without a state.
        data_dir: TensorFlow Datasets directory.
        batch_size: examples per batch, drawn with replacement.
        horizon: number of training steps.

    Raises:
        ValueError: a setting is out of range.
        DataError: the data are not there.
    """
    if min(batch_size, horizon) < 1:
        raise ValueError("batch_size and horizon must be at least 1")
    data = dataset.load(data_dir)
    assert dataset.classes is not None
    shape = LARGE, LARGE, data["train"]["image"].shape[1] // LARGE**2

    def init(key: jax.Array) -> PyTree:
        return model.init(key, jnp.zeros((1, *shape)))["params"]

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        logits: Any = model.apply({"params": params}, batch["image"].reshape(-1, *shape))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    cap = 1.5 * math.log(dataset.classes)
    return Task(name, horizon, batch_size, cap, data, init, loss, batches(batch_size), at_once=AT_ONCE)


class BatchNorm(nn.Module):
    """Batch normalisation by the batch that it is given, also where the loss is tested: a task's model has no state."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Normalise each channel, then scale and shift it."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        centred = x - x.mean((0, 1, 2))
        return centred * (scale * jax.lax.rsqrt((centred**2).mean((0, 1, 2)) + 1e-5)) + bias
