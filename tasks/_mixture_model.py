"""The models of the mixture: multi-layer perceptrons with settings, as classifiers or autoencoders."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from gmn_lopt.meta.task import Task

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}


@dataclass(frozen=True)
class Model:
    """Settings of one task.

    Attributes:
        hidden: widths of the hidden layers.
        batch_size: examples per batch.
        horizon: training steps.
        activation: a key of ``ACTIVATIONS``.
        standardise: whether inputs get mean 0 and standard deviation 1 (over all of them), instead of lying in [0, 1].
        autoencode: whether the task is to give back the (standardised or not) input, with squared error, instead of
            the class.
        init_scale: what the initial kernels are multiplied by.
    """

    hidden: tuple[int, ...]
    batch_size: int = 128
    horizon: int = 2000
    activation: str = "relu"
    standardise: bool = False
    autoencode: bool = False
    init_scale: float = 1.0


def mlp_task(name: str, data: Mapping[str, PyTree], classes: int, model: Model) -> Task:
    """A task on images ``{"image": [n, pixels], "label": [n]}`` in [0, 1]; see :class:`Model`."""
    images = np.asarray(data["train"]["image"])
    pixels = images.shape[1]
    mean, deviation = (float(images.mean()), float(images.std())) if model.standardise else (0.0, 1.0)
    widths = (pixels, *model.hidden, pixels if model.autoencode else classes)
    act = ACTIVATIONS[model.activation]

    def init(key: jax.Array) -> PyTree:
        params = {}
        for i, layer_key in enumerate(jax.random.split(key, len(widths) - 1)):
            kernel = model.init_scale * jax.nn.initializers.lecun_normal()(layer_key, widths[i : i + 2])
            params[f"layer_{i}"] = {"kernel": kernel, "bias": jnp.zeros(widths[i + 1])}
        return params

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        image = (batch["image"] - mean) / deviation
        x = image
        for i in range(len(params)):
            x = act(x) if i > 0 else x
            x = x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
        if model.autoencode:
            return jnp.mean((x - image) ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(x, batch["label"]).mean()

    def sample(key: jax.Array, split: PyTree) -> PyTree:
        index = jax.random.randint(key, (model.batch_size,), 0, len(split["label"]))
        return jax.tree.map(lambda array: jnp.take(array, index, axis=0, mode="clip"), split)

    scale = float((((images - mean) / deviation) ** 2).mean()) if model.autoencode else math.log(classes)
    return Task(name, model.horizon, model.batch_size, 1.5 * scale, data, init, loss, sample)
