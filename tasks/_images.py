"""Images for the tasks: read from TensorFlow Datasets, resized to 8x8, scaled to [0, 1], flattened, cached."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from tasks._cache import Arrays, DataError, cache_path, cached

SIZE = 8
VERSION = 1  # of the cached arrays: raise it whenever what `_build` makes changes

Split = dict[str, np.ndarray]  # {"image": Float32["examples pixels"], "label": Int32["examples"]}


def load_images(name: str, features: int, classes: int, data_dir: str | None = None) -> Mapping[str, Split]:
    """The splits of a TensorFlow Datasets image classification data set, downsized to 8x8.

    Args:
        name: the data set's name in TensorFlow Datasets.
        features: number of values of a downsized image, ``8 * 8 * channels``.
        classes: number of classes.
        data_dir: TensorFlow Datasets directory to read from; None for the cached arrays, wherever they came from, or
            else TensorFlow Datasets' default directory.

    Returns:
        ``"train"`` and ``"valid"``, the first 80 % of the training split and the rest, and ``"test"``. Each is
        ``{"image": float32 [examples, features] in [0, 1], "label": int32 [examples]}``.

    Raises:
        DataError: the data set is neither cached nor prepared, and could not be brought.
    """
    source = None if data_dir is None else str(Path(data_dir).expanduser().resolve())
    arrays = cached(
        f"{name}-{SIZE}x{SIZE}",
        VERSION,
        build=lambda: _build(name, source),
        check=lambda arrays: _check(arrays, features, classes),
        source=source,
    )
    training, test = (
        {"image": arrays[f"{split}_image"], "label": arrays[f"{split}_label"]} for split in ("train", "test")
    )
    return {**train_valid(training), "test": test}


def train_valid(training: Split) -> dict[str, Split]:
    """Cut a training split into ``"train"``, its first 80 %, and ``"valid"``, the rest."""
    cut = len(next(iter(training.values()))) * 4 // 5
    return {
        "train": {key: array[:cut] for key, array in training.items()},
        "valid": {key: array[cut:] for key, array in training.items()},
    }


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


def _build(name: str, data_dir: str | None) -> Arrays:
    """Read both splits from TensorFlow Datasets and downsize them."""
    arrays = {}
    try:
        for split, source in _open(name, data_dir).items():
            arrays[f"{split}_image"], arrays[f"{split}_label"] = read(source, f"{name} {split}")
    except Exception as error:  # TensorFlow Datasets documents no base class for what goes wrong in it
        where = data_dir or "the default directory of TensorFlow Datasets"
        kept = cache_path(f"{name}-{SIZE}x{SIZE}")
        place = f", data_dir={data_dir!r}" if data_dir else ""
        prepare = f"tfds.builder({name!r}, file_format='array_record'{place}).download_and_prepare()"
        raise DataError(
            f"data set {name!r} has no usable cache {kept} and cannot be read from {where}: "
            f"{' '.join(str(error).split()) or type(error).__name__}. To bring it: pip install 'gmn_lopt[datasets]' "
            f'tensorflow; python -c "import tensorflow_datasets as tfds; {prepare}" (only this step needs TensorFlow '
            "and a network); or pass --data-dir DIR where it is prepared already"
        ) from error
    return arrays


def _open(name: str, data_dir: str | None) -> dict[str, Any]:
    """Random-access sources of the splits, preparing the data set first where that has not been done."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    if not builder.is_prepared():
        try:
            import tensorflow  # noqa: F401  # without it preparing fails, but only after the download
        except ImportError as error:
            raise DataError(f"it is not prepared there, and preparing it needs TensorFlow ({error})") from error
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    return {split: builder.as_data_source(split) for split in ("train", "test")}


def read(
    source: Any, description: str, chunk: int = 1000
) -> tuple[Float[np.ndarray, "examples features"], Int[np.ndarray, "examples"]]:
    """Read, downsize and flatten all images of a source, and their labels.

    Args:
        source: a ``tfds.data_source``: its length, and ``__getitems__``, which decodes several examples faster than one
            at a time.
        description: shown beside the progress bar, which is drawn on a terminal only.
        chunk: number of full-sized images held at once.
    """
    from tqdm import tqdm  # TensorFlow Datasets brings it along

    images: list[np.ndarray] = []
    labels: list[int] = []
    with tqdm(total=len(source), desc=f"downsizing {description}", unit=" images", disable=None, leave=False) as bar:
        for start in range(0, len(source), chunk):
            examples = source.__getitems__(list(range(start, min(start + chunk, len(source)))))
            images.append(resize(np.stack([example["image"] for example in examples]), SIZE))
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
