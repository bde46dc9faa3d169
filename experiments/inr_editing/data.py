"""Implicit neural representations to edit: a SIREN fitted to each image of a data set, cached.

The images are real ones. Networks of the training split show images of the data set's training split, those of
``"valid"`` the ones after them, those of ``"test"`` images of its test split. Every network starts from weights of its
own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.inr_editing import edits, siren
from gmn_lopt.tasks.data.cache import Arrays, cache_path, cached
from gmn_lopt.tasks.data.images import resize
from gmn_lopt.tasks.data.scikit_learn import load_digits
from gmn_lopt.tasks.data.tfds import read_splits, resolved
from gmn_lopt.util.errors import UsageError
from gmn_lopt.util.progress import progress

VERSION = 1  # of the cached networks: raise it whenever what `fit` makes changes
CHUNK = 256  # networks in a file; an interrupted run loses no more than one file


@dataclass(frozen=True)
class Images:
    """A data set of images and what is to be done to them.

    Attributes:
        height, width, channels: the size of an image.
        low, high: the values that networks give to black and white.
        edit: from images in [0, 1], ``[n, height, width, channels]``, to edited ones.
        steps: steps of Adam that a network is fitted with.
    """

    height: int
    width: int
    channels: int
    low: float
    high: float
    edit: Callable[[np.ndarray], np.ndarray]
    steps: int


# MNIST's networks give values minus 1/2, CIFAR-10's are on [-1, 1] (arXiv:2507.01649, appendix F.3).
IMAGES = {
    "digits": Images(16, 16, 1, -0.5, 0.5, edits.dilate, 200),
    "fashion_mnist": Images(28, 28, 1, -0.5, 0.5, edits.dilate, 300),
    "cifar10": Images(32, 32, 3, -1.0, 1.0, edits.contrast, 500),
}
RATE, PIXELS = 2e-3, 128  # of the fit: Adam's learning rate, which falls to zero, and random pixels in a step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Split:
    """Networks and what they are to show (a pytree).

    Attributes:
        params: the networks' weights, one more axis in front.
        original, target: the image and the edited image, ``[n, pixels, channels]``, as values of networks.
    """

    params: siren.Params
    original: Float[Array, "n pixels c"]
    target: Float[Array, "n pixels c"]

    def __len__(self) -> int:
        return len(self.target)


def load(name: str, counts: dict[str, int], data_dir: str | None = None, quiet: bool = False) -> dict[str, Split]:
    """Fit networks to images, or read them from the cache.

    Args:
        name: one of ``IMAGES``.
        counts: how many networks of ``"train"``, ``"valid"`` and ``"test"`` are wanted.
        data_dir: a directory of TensorFlow Datasets; None for its default one.
        quiet: whether to show no progress.

    Raises:
        UsageError: there is no such data set, or it has fewer images.
        DataError: it is not there, and how to bring it.
    """
    if name not in IMAGES:
        raise UsageError(f"unknown data set {name!r}: choose one of {', '.join(IMAGES)}")
    first = {"train": ("train", 0), "valid": ("train", counts["train"]), "test": ("test", 0)}
    wanted = {"train": counts["train"] + counts["valid"], "test": counts["test"]}
    images = {split: array[: wanted[split]] for split, array in _read(name, max(wanted.values()), data_dir).items()}
    for split, count in wanted.items():
        if len(images[split]) < count:
            raise UsageError(f"{name} has {len(images[split])} images in its {split} split, fewer than {count}")
    fitted = {split: fit(name, split, array, quiet) for split, array in images.items()}
    splits = {}
    for key, (split, start) in first.items():
        part = slice(start, start + counts[key])
        original = images[split][part].astype(np.float64)
        shown = [_values(IMAGES[name], array) for array in (original, IMAGES[name].edit(original))]
        splits[key] = Split({k: jnp.asarray(v[part]) for k, v in fitted[split].items()}, *map(jnp.asarray, shown))
    return splits


def fit(name: str, split: str, images: Float[np.ndarray, "n height width c"], quiet: bool = False) -> Arrays:
    """The weights of networks that show these images: the first so many of a data set's split.

    The network of an image depends on nothing but the image and its number.
    """
    kind, fitted = IMAGES[name], []
    values = _values(kind, images)
    key = jax.random.key(0 if split == "train" else 1)
    # One network after the other: products of many small matrices at once are slow on a processor.
    run = jax.jit(lambda keys, values: jax.lax.map(lambda one: _fit_one(kind, *one), (keys, values)))

    def make(keys: Array, values: Array) -> Arrays:
        fitted: Arrays = jax.tree.map(np.asarray, run(keys, values))
        return fitted

    with progress(len(images), f"{name} {split}", "networks", disable=quiet) as bar:
        for start in range(0, len(images), CHUNK):
            part = values[start : start + CHUNK]
            keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(start, start + len(part)))
            fitted.append(
                cached(
                    f"siren-{name}-{kind.height}x{kind.width}-{split}-{start}-{len(part)}",
                    VERSION,
                    build=partial(make, keys, jnp.asarray(part)),
                    check=partial(_check, kind, len(part)),
                )
            )
            bar.update(len(part))
    return {k: np.concatenate([chunk[k] for chunk in fitted]) for k in fitted[0]}


def _fit_one(kind: Images, key: Array, values: Float[Array, "pixels c"]) -> siren.Params:
    points = siren.grid(kind.height, kind.width)
    tx = optax.adam(optax.cosine_decay_schedule(RATE, kind.steps))

    def step(carry: Any, key: Array) -> tuple[Any, None]:
        params, state = carry
        chosen = jax.random.randint(key, (min(PIXELS, len(points)),), 0, len(points))
        loss = lambda p: ((siren.forward(p, points[chosen])[-1] - values[chosen]) ** 2).mean()  # noqa: E731
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = siren.init(key, kind.channels)
    steps = jax.random.split(jax.random.fold_in(key, 0), kind.steps)
    return jax.lax.scan(step, (params, tx.init(params)), steps)[0][0]


def psnr(name: str, split: Split) -> float:
    """The mean over networks of the peak signal-to-noise ratio of what they show, in dB."""
    kind = IMAGES[name]
    points = siren.grid(kind.height, kind.width)
    shown = jax.jit(lambda params: jax.lax.map(lambda one: siren.forward(one, points)[-1], params))(split.params)
    errors = np.asarray(((shown - split.original) ** 2).mean((1, 2)), np.float64)
    return float((10 * np.log10((kind.high - kind.low) ** 2 / errors)).mean())


def _read(name: str, count: int, data_dir: str | None) -> dict[str, Float[np.ndarray, "n height width c"]]:
    """At least the first ``count`` images of both splits, in [0, 1], or as many as there are."""
    kind = IMAGES[name]
    if name == "digits":
        splits = load_digits()
        small = {
            "train": np.concatenate([splits["train"]["image"], splits["valid"]["image"]]),
            "test": splits["test"]["image"],
        }
        # Of 8x8 pixels, a filter of 3x3 leaves hardly anything but white.
        return {split: resize(array.reshape(-1, 8, 8, 1), kind.height) for split, array in small.items()}
    count = -(-count // 1000) * 1000
    kept = f"images-{name}-{count}"

    def first(source: Any) -> np.ndarray:
        examples = source.__getitems__(list(range(min(count, len(source)))))
        return np.stack([example["image"] for example in examples])

    def check(arrays: Arrays) -> None:
        for array in arrays.values():
            if array.dtype != np.uint8 or array.shape[1:] != (kind.height, kind.width, kind.channels):
                raise ValueError(
                    f"images of {name} have the shape {array.shape[1:]} and are {array.dtype}, expected "
                    f"{(kind.height, kind.width, kind.channels)} and uint8"
                )

    source = resolved(data_dir)
    build = partial(read_splits, name, source, cache_path(kept), first)
    arrays = cached(kept, VERSION, build=build, check=check, source=source)
    return {split: array / np.float32(255) for split, array in arrays.items()}


def _values(kind: Images, images: Float[np.ndarray, "n height width c"]) -> Float[np.ndarray, "n pixels c"]:
    """The values that networks give to the pixels of images in [0, 1]."""
    if images.shape[1:] != (kind.height, kind.width, kind.channels):
        raise UsageError(f"images of {images.shape[1:]} pixels, expected {(kind.height, kind.width, kind.channels)}")
    flat = images.reshape(len(images), -1, kind.channels)
    return (kind.low + (kind.high - kind.low) * flat).astype(np.float32)


def _check(kind: Images, count: int, arrays: Arrays) -> None:
    """Raise ValueError where arrays are not so many networks for such images."""
    expected = jax.eval_shape(partial(siren.init, channels=kind.channels), jax.random.key(0))
    shapes = {k: (count, *x.shape) for k, x in expected.items()}
    if {k: array.shape for k, array in arrays.items()} != shapes:
        raise ValueError(f"it does not hold {count} networks of this architecture")
    if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays.values()):
        raise ValueError("it holds weights that are not finite, or not float32")
