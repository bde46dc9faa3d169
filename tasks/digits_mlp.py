"""An MLP on scikit-learn's digits: 1,797 real images of 8x8 pixels that come with the package.

There is no official test split: the images are shuffled once, always alike; 1,437 are the training split (1,149 of
them train, 288 validate) and 360 the test split. With so few images a faster optimizer would only overfit sooner, so
training images are shifted at random by up to one pixel each way.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from gmn_lopt.meta.task import Task
from tasks._cache import DataError
from tasks._images import Split, train_valid

CLASSES = 10


def make(
    data_dir: str | None = None,
    *,
    hidden: tuple[int, ...] = (32,),
    batch_size: int = 128,
    horizon: int = 500,
    augment: bool = True,
) -> Task:
    """A 64-32-10 ReLU network.

    Args:
        data_dir: not used, the images come with scikit-learn.
        hidden: widths of the hidden layers.
        batch_size: images per batch, drawn with replacement.
        horizon: number of training steps.
        augment: whether training images are shifted.
    """
    del data_dir
    if min(*hidden, batch_size, horizon) < 1:
        raise ValueError("hidden, batch_size and horizon must be at least 1")
    widths = (64, *hidden, CLASSES)

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
        index_key, shift_key = jax.random.split(key)
        index = jax.random.randint(index_key, (batch_size,), 0, len(split["label"]))
        batch = jax.tree.map(lambda array: jnp.take(array, index, axis=0, mode="clip"), split)
        if augment:
            down, right = jnp.divmod(jax.random.randint(shift_key, (batch_size,), 0, 9), 3)
            batch["image"] = shift(batch["image"], down - 1, right - 1)
        return batch

    return Task("digits_mlp", horizon, batch_size, 1.5 * math.log(CLASSES), load(), init, loss, sample)


def load() -> dict[str, Split]:
    """The splits, ``{"image": float32 [examples, 64] in [0, 1], "label": int32 [examples]}`` each."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("task 'digits_mlp' needs scikit-learn: pip install 'gmn_lopt[train]'") from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))  # the generator whose stream NumPy has frozen
    images, labels = images[order].astype(np.float32) / 16, labels[order].astype(np.int32)
    test = {"image": images[1437:], "label": labels[1437:]}
    return {**train_valid({"image": images[:1437], "label": labels[:1437]}), "test": test}


def shift(
    images: Float[Array, "batch 64"], down: Int[Array, "batch"], right: Int[Array, "batch"]
) -> Float[Array, "batch 64"]:
    """Shift each image by -1, 0 or 1 pixels down and to the right, filling up with zeros."""
    images = images.reshape(-1, 8, 8)
    for axis, steps in ((1, down[:, None, None]), (2, right[:, None, None])):
        # A choice between three slices: elementwise, so far cheaper on a CPU than a gather from every image.
        padded = jnp.pad(images, [(1, 1) if i == axis else (0, 0) for i in range(3)])
        back, forth = (jax.lax.slice_in_dim(padded, start, start + 8, axis=axis) for start in (2, 0))
        images = jnp.where(steps < 0, back, jnp.where(steps > 0, forth, images))
    return images.reshape(-1, 64)
