"""What the tasks on images and tables share: multi-layer perceptrons, as classifiers, regressions or autoencoders."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from gmn_lopt.meta.task import Task
from gmn_lopt.tasks.data import Dataset, batches

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


def make_mlp(
    name: str,
    dataset: Dataset,
    data_dir: str | None = None,
    *,
    hidden: tuple[int, ...] = (32,),
    batch_size: int = 128,
    horizon: int = 2000,
    activation: str = "relu",
    standardise: bool = False,
    autoencode: bool = False,
    init_scale: float = 1.0,
) -> Task:
    """A task on examples of fixed size: the class by cross-entropy, or a number by squared error.

    Args:
        name: the task's name.
        dataset: the examples.
        data_dir: TensorFlow Datasets directory, for a data set that is read from one.
        hidden: widths of the hidden layers.
        batch_size: examples per batch, drawn with replacement.
        horizon: number of training steps.
        activation: ``"relu"``, ``"tanh"``, ``"gelu"`` or ``"silu"``.
        standardise: whether inputs get mean 0 and standard deviation 1, over all of them.
        autoencode: whether the (standardised or not) input is to be given back, with squared error.
        init_scale: what the initial kernels are multiplied by.

    Raises:
        ValueError: a setting is out of range.
        DataError: the data are not there.
    """
    if min(*hidden, batch_size, horizon) < 1:
        raise ValueError("hidden, batch_size and horizon must be at least 1")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    data, act = dataset.load(data_dir), ACTIVATIONS[activation]
    read, wanted = data["train"]  # the names of inputs and targets
    inputs = data["train"][read]
    mean, deviation = (float(inputs.mean()), float(inputs.std())) if standardise else (0.0, 1.0)
    features = inputs.shape[1]
    widths = (features, *hidden, features if autoencode else dataset.classes or 1)

    def init(key: jax.Array) -> PyTree:
        params = {}
        for i, layer_key in enumerate(jax.random.split(key, len(widths) - 1)):
            # lecun_normal: a truncated normal whose standard deviation, after truncation, is 1/sqrt(fan_in).
            kernel = init_scale * jax.nn.initializers.lecun_normal()(layer_key, widths[i : i + 2])
            params[f"layer_{i}"] = {"kernel": kernel, "bias": jnp.zeros(widths[i + 1])}
        return params

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        x = shown = (batch[read] - mean) / deviation
        for i in range(len(params)):
            x = act(x) if i > 0 else x
            x = x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
        if autoencode:
            return jnp.mean((x - shown) ** 2)
        if dataset.classes is None:
            return jnp.mean((x[:, 0] - batch[wanted]) ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(x, batch[wanted]).mean()

    # The loss of a model that knows nothing, or near it.
    if autoencode:
        scale = float(np.square((inputs - mean) / deviation).mean())
    else:
        scale = 1.0 if dataset.classes is None else math.log(dataset.classes)
    return Task(name, horizon, batch_size, 1.5 * scale, data, init, loss, batches(batch_size))
