"""Reading and caching of the tasks' data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

Split = dict[str, np.ndarray]
"""Examples along the first axis of each array: what a network reads first, then what it is to say."""


@dataclass(frozen=True)
class Dataset:
    """Examples for classifiers and regressions.

    Attributes:
        load: ``load(data_dir)`` gives the splits ``"train"``, ``"valid"`` and ``"test"``: inputs, float32
            ``[examples, features]``, and targets, int32 or (for a regression) float32 ``[examples]``.
        classes: number of classes; None for a regression.
    """

    load: Callable[[str | None], Mapping[str, Split]]
    classes: int | None


def train_valid(training: Split) -> dict[str, Split]:
    """Cut a training split into ``"train"``, its first 80 %, and ``"valid"``, the rest."""
    cut = len(next(iter(training.values()))) * 4 // 5
    return {
        "train": {key: array[:cut] for key, array in training.items()},
        "valid": {key: array[cut:] for key, array in training.items()},
    }


def batches(size: int) -> Callable[[jax.Array, PyTree], PyTree]:
    """The function ``sample(key, split)`` that draws ``size`` examples with replacement."""

    def sample(key: jax.Array, split: PyTree) -> PyTree:
        index = jax.random.randint(key, (size,), 0, len(jax.tree.leaves(split)[0]))
        return jax.tree.map(lambda array: jnp.take(array, index, axis=0, mode="clip"), split)

    return sample
