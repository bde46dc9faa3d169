"""Reading and caching of the tasks' data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Split = dict[str, np.ndarray]
"""Examples along the first axis of each array: what a network reads first, then what it is to say."""


@dataclass(frozen=True)
class Dataset:
    """Examples for multi-layer perceptrons.

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
