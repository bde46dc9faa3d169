"""Images for the tasks: read from TensorFlow Datasets, resized to 8x8 or 16x16, scaled to [0, 1], flattened, cached."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from gmn_lopt.tasks.data import Dataset, Split, train_valid
from gmn_lopt.tasks.data.cache import Arrays, cache_path, cached
from gmn_lopt.tasks.data.tfds import read_splits, resolved

SIZE, LARGE = 8, 16
VERSION = 1  # of the cached arrays: raise it whenever what `_build` makes changes


def load_images(
    name: str, features: int, classes: int, data_dir: str | None = None, size: int = SIZE
) -> Mapping[str, Split]:
    """The splits of a TensorFlow Datasets image classification data set, downsized.

    Args:
        name: the data set's name in TensorFlow Datasets.
        features: number of values of a downsized image, ``size * size * channels``.
        classes: number of classes.
        data_dir: TensorFlow Datasets directory to read from; None for the cached arrays, wherever they came from, or
            else TensorFlow Datasets' default directory.
        size: height and width of a downsized image.

    Returns:
        ``"train"`` and ``"valid"``, the first 80 % of the training split and the rest, and ``"test"``. Each is
        ``{"image": float32 [examples, features] in [0, 1], "label": int32 [examples]}``.

    Raises:
        DataError: the data set is neither cached nor prepared, and could not be brought.
    """
    source, kept = resolved(data_dir), f"{name}-{size}x{size}"
    arrays = cached(
        kept,
        VERSION,
        build=lambda: _build(name, source, cache_path(kept), size),
        check=lambda arrays: _check(arrays, features, classes),
        source=source,
    )
    training, test = (
        {"image": arrays[f"{split}_image"], "label": arrays[f"{split}_label"]} for split in ("train", "test")
    )
    return {**train_valid(training), "test": test}


def resize(images: Shaped[np.ndarray, "examples height width channels"], size: int) -> Float[np.ndarray, "..."]:
    """Resize as ``tf.image.resize`` does: bilinear, half-pixel centres, no antialiasing.

    Both axes are resampled by one matrix each. At 32 -> 8 that averages the central 2x2 pixels of every 4x4 block.

    Returns:
        ``[examples, size, size, channels]``, float32, on the scale of the input.
    """
    rows, columns = (_interpolation(length, size) for length in images.shape[1:3])
    return np.einsum("ih,nhwc,jw->nijc", rows, images.astype(np.float32), columns, optimize=True)


def _interpolation(length: int, size: int) -> Float[np.ndarray, "size length"]:
    """The matrix that samples ``length`` pixels at the centres of ``size`` pixels, linearly between two neighbours."""
    centres = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    # A hat function of width 1 around every centre: 1 - distance for the two pixels next to it, 0 for the others.
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(length))).astype(np.float32)


def _build(name: str, data_dir: str | None, kept: Path, size: int) -> Arrays:
    """Read both splits from TensorFlow Datasets and downsize them."""
    small = lambda source: dict(zip(("image", "label"), read(source, name, size=size)))  # noqa: E731
    splits = read_splits(name, data_dir, kept, small)
    return {f"{split}_{key}": array for split, arrays in splits.items() for key, array in arrays.items()}


def read(
    source: Any, description: str, chunk: int = 1000, size: int = SIZE
) -> tuple[Float[np.ndarray, "examples features"], Int[np.ndarray, "examples"]]:
    """Downsize and flatten the images of a ``tfds.data_source``, and read their labels.

    Args:
        source: its ``__getitems__`` decodes several examples faster than one at a time.
        description: shown beside the progress bar, which is drawn on a terminal only.
        chunk: number of full-sized images held at once.
        size: height and width of a downsized image.
    """
    from tqdm import tqdm  # TensorFlow Datasets brings it along

    images: list[np.ndarray] = []
    labels: list[int] = []
    with tqdm(total=len(source), desc=f"downsizing {description}", unit=" images", disable=None, leave=False) as bar:
        for start in range(0, len(source), chunk):
            examples = source.__getitems__(list(range(start, min(start + chunk, len(source)))))
            images.append(resize(np.stack([example["image"] for example in examples]), size))
            labels.extend(example["label"] for example in examples)
            bar.update(len(examples))
    flat = np.concatenate(images).reshape(len(labels), -1) / np.float32(255)
    return flat, np.asarray(labels, np.int32)


def _check(arrays: Arrays, features: int, classes: int) -> None:
    """Raise ValueError where arrays are not what `_build` makes of this data set."""
    expected = {f"{split}_{key}" for split in ("train", "test") for key in ("image", "label")}
    if set(arrays) != expected:
        raise ValueError(f"it holds {sorted(arrays)}, expected {sorted(expected)}")
    for split in ("train", "test"):
        image, label = arrays[f"{split}_image"], arrays[f"{split}_label"]
        if image.dtype != np.float32 or label.dtype != np.int32:
            raise ValueError(f"{split}: images of {image.dtype} and labels of {label.dtype}, not of float32 and int32")
        if label.ndim != 1 or image.shape != (len(label), features) or not len(label):
            raise ValueError(f"{split}: images {image.shape} and labels {label.shape}, expected (n, {features}), (n,)")
        if not (image.min() >= 0 and image.max() <= 1):  # also refuses NaN
            raise ValueError(f"{split}: images are not in [0, 1]")
        if not (label.min() >= 0 and label.max() < classes):
            raise ValueError(f"{split}: labels are not in 0..{classes - 1}")


def _dataset(name: str, channels: int, classes: int, size: int = SIZE) -> Dataset:
    return Dataset(partial(load_images, name, size * size * channels, classes, size=size), classes)


FASHION_MNIST = _dataset("fashion_mnist", 1, 10)
CIFAR10 = _dataset("cifar10", 3, 10)
CIFAR100 = _dataset("cifar100", 3, 100)
LARGE_FASHION_MNIST = _dataset("fashion_mnist", 1, 10, LARGE)
LARGE_CIFAR10 = _dataset("cifar10", 3, 10, LARGE)
