"""An MLP on scikit-learn's digits: 1,797 real images of 8x8 pixels that come with the package.

There is no official test split: the images are shuffled once, always alike; 1,437 are the training split (1,149 of
them train, 288 validate) and 360 the test split. With so few images a faster optimizer would only overfit sooner, so
training images are shifted at random by up to one pixel each way.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from gmn_lopt.meta.task import Task
from gmn_lopt.tasks.data.scikit_learn import DIGITS
from gmn_lopt.tasks.mlp import make_mlp


def make(
    data_dir: str | None = None,
    *,
    hidden: tuple[int, ...] = (32,),
    batch_size: int = 128,
    horizon: int = 500,
    augment: bool = True,
) -> Task:
    """A 64-32-10 ReLU network; ``augment`` says whether training images are shifted.

    The other settings are those of :func:`gmn_lopt.tasks.mlp.make_mlp`; ``data_dir`` is not used.
    """
    task = make_mlp("digits_mlp", DIGITS, data_dir, hidden=hidden, batch_size=batch_size, horizon=horizon)

    def sample(key: jax.Array, split: PyTree) -> PyTree:
        index_key, shift_key = jax.random.split(key)
        batch = task.sample(index_key, split)
        if augment:
            down, right = jnp.divmod(jax.random.randint(shift_key, (batch_size,), 0, 9), 3)
            batch["image"] = shift(batch["image"], down - 1, right - 1)
        return batch

    return replace(task, sample=sample)


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
