"""What the examples share: scikit-learn's digits, 1,797 images of 8x8 pixels that come with the package."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from sklearn.datasets import load_digits

Batch = tuple[Float[Array, "batch 64"], Int[Array, "batch"]]


def batches(steps: int, size: int = 128) -> Iterator[Batch]:
    """Random batches of one size: the learned optimizers keep averages for each slot of the batch."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = rng.integers(0, len(labels), size)
        yield jnp.asarray(images[chosen] / 16, jnp.float32), jnp.asarray(labels[chosen])
