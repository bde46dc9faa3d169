"""Images: resizing, reading from TensorFlow Datasets, and the cache."""

import errno
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmn_lopt.tasks.data.cache import DataError, cache_dir, cached
from gmn_lopt.tasks.data.images import load_images, read, resize
from gmn_lopt.tasks.data.tfds import read_splits

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "tfds"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no prepared TensorFlow Datasets directory {REAL}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GMN_LOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Resizing


def naive_bilinear(images, size):
    """The definition, pixel by pixel: sample at half-pixel centres, neighbours beyond the edge repeat it."""
    count, height, width, channels = images.shape
    out = np.zeros((count, size, size, channels))
    for i in range(size):
        for j in range(size):
            y, x = (i + 0.5) * height / size - 0.5, (j + 0.5) * width / size - 0.5
            top, left = int(np.floor(y)), int(np.floor(x))
            for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = abs(1 - dy - (y - top)) * abs(1 - dx - (x - left))
                row, column = np.clip(top + dy, 0, height - 1), np.clip(left + dx, 0, width - 1)
                out[:, i, j] += weight * images[:, row, column]
    return out


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 33), st.integers(1, 33), st.integers(1, 12), st.sampled_from([1, 3]), st.integers(0, 9))
def test_resize_against_definition(height, width, size, channels, seed):
    images = np.random.default_rng(seed).integers(0, 256, (2, height, width, channels), np.uint8)
    resized = resize(images, size)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, naive_bilinear(images, size), atol=1e-3)  # of 255


@pytest.mark.parametrize("length", [8, 28, 32])
def test_resize_against_jax(length):
    images = np.random.default_rng(0).integers(0, 256, (3, length, length, 3), np.uint8)
    expected = jax.image.resize(images.astype(np.float32), (3, 8, 8, 3), "linear", antialias=False)
    np.testing.assert_allclose(resize(images, 8), expected, atol=1e-3)


def test_resize_32_to_8_averages_the_central_four_pixels():
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    blocks = images.reshape(5, 8, 4, 8, 4, 3).astype(np.float64)
    np.testing.assert_allclose(resize(images, 8), blocks[:, :, 1:3, :, 1:3].mean((2, 4)), atol=1e-4)


def test_resize_28_to_8_interpolates_between_two_pixels():
    """Centres lie at 1.25 + 3.5 i: a quarter, or three quarters, of the way from one pixel to the next."""
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), np.uint8).astype(np.float64)
    low = np.array([1, 4, 8, 11, 15, 18, 22, 25])
    part = np.array([0.25, 0.75] * 4)
    rows = images[:, low] * (1 - part)[:, None, None] + images[:, low + 1] * part[:, None, None]
    expected = rows[:, :, low] * (1 - part)[:, None] + rows[:, :, low + 1] * part[:, None]
    np.testing.assert_allclose(resize(images, 8), expected, atol=1e-4)


# The cache


def arrays_of(value):
    return {"numbers": np.full(3, value, np.float32)}


class Build:
    """Counts how often it is asked for arrays."""

    def __init__(self, value=1.0):
        self.value, self.calls = value, 0

    def __call__(self):
        self.calls += 1
        return arrays_of(self.value)


def check(arrays):
    if arrays["numbers"].shape != (3,):
        raise ValueError("wrong shape")


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("GMN_LOPT_CACHE", "~/here")
    assert cache_dir() == Path.home() / "here"
    monkeypatch.delenv("GMN_LOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "gmn_lopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "gmn_lopt"


@pytest.mark.filterwarnings("error")
def test_cache_round_trip(cache):
    build = Build(0.1)
    first = cached("x", 1, build, check)
    second = cached("x", 1, build, check)
    assert build.calls == 1
    assert second.keys() == first.keys() == {"numbers"}
    np.testing.assert_array_equal(second["numbers"], first["numbers"])
    assert second["numbers"].dtype == np.float32
    assert [path.name for path in cache.iterdir()] == ["x.npz"]


@pytest.mark.parametrize(
    "damage", ["empty", "truncated", "flipped", "text", "pickle", "shape", "keys", "directory", "pipe"]
)
def test_damaged_cache_is_made_anew(cache, damage):
    cached("x", 1, Build(1.0), check)
    path = cache / "x.npz"
    data = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        place = data.index(np.float32(1.0).tobytes())
        path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    elif damage == "text":
        path.write_text("not an archive")
    elif damage == "pickle":
        np.savez(path, numbers=np.array([object()], object), version=1, source="")
    elif damage == "shape":
        np.savez(path, numbers=np.zeros((2, 2)), version=1, source="")
    elif damage == "keys":
        np.savez(path, numbers=np.zeros(3))
    else:
        path.unlink()
        path.mkdir() if damage == "directory" else os.mkfifo(path)
    build = Build(2.0)
    with pytest.warns(UserWarning, match=r"x\.npz is not used but made anew"):
        if damage == "directory":
            with pytest.warns(UserWarning, match="cannot be written"):
                arrays = cached("x", 1, build, check)
        else:
            arrays = cached("x", 1, build, check)
    assert build.calls == 1
    np.testing.assert_array_equal(arrays["numbers"], arrays_of(2.0)["numbers"])
    if damage != "directory":
        np.testing.assert_array_equal(cached("x", 1, build, check)["numbers"], arrays["numbers"])
        assert build.calls == 1


def test_other_version_or_source_is_made_anew(cache):
    build = Build()
    cached("x", 1, build, check, source="/one")
    with pytest.warns(UserWarning, match="version 1, this code reads version 2"):
        cached("x", 2, build, check, source="/one")
    with pytest.warns(UserWarning, match="made from /one, not from /two"):
        cached("x", 2, build, check, source="/two")
    assert build.calls == 3
    cached("x", 2, build, check, source="/two")
    cached("x", 2, build, check)  # no wish as to the source: whatever is there
    assert build.calls == 3


@pytest.mark.parametrize("failing", ["savez", "replace", "mkdir"])
def test_unwritable_cache_loses_nothing(cache, monkeypatch, failing):
    cached("x", 1, Build(1.0), check)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = {"savez": np, "replace": os, "mkdir": Path}[failing]
    with monkeypatch.context() as patch:
        patch.setattr(owner, failing, full)
        with pytest.warns(UserWarning) as caught:
            arrays = cached("x", 2, Build(2.0), check)
    assert any("cannot be written (No space left on device)" in str(warning.message) for warning in caught)
    np.testing.assert_array_equal(arrays["numbers"], arrays_of(2.0)["numbers"])
    # What was kept before is whole, and no temporary file is left over.
    assert [path.name for path in cache.iterdir()] == ["x.npz"]
    np.testing.assert_array_equal(cached("x", 1, Build(3.0), check)["numbers"], arrays_of(1.0)["numbers"])


def test_what_a_killed_process_left_in_the_cache_is_removed(cache):
    cache.mkdir(exist_ok=True)
    for name, age in ((".x.npz.12.partial", 4000), (".y.npz.13.partial", 0)):
        (cache / name).write_bytes(b"half of it")
        os.utime(cache / name, (time.time() - age,) * 2)
    cached("x", 1, Build(1.0), check)
    assert sorted(path.name for path in cache.iterdir()) == [".y.npz.13.partial", "x.npz"]


def test_interrupted_write_keeps_the_old_file(cache, monkeypatch):
    cached("x", 1, Build(1.0), check)

    def interrupted(file, **arrays):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", interrupted)
        with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="version"):
            cached("x", 2, Build(2.0), check)
    assert [path.name for path in cache.iterdir()] == ["x.npz"]
    np.testing.assert_array_equal(cached("x", 1, Build(3.0), check)["numbers"], arrays_of(1.0)["numbers"])


# Reading from TensorFlow Datasets


class Source(list):
    """Behaves like a ``tfds.data_source``."""

    def __getitems__(self, keys):
        return [self[key] for key in keys]


def fake_tfds(prepared=True, fail=None):
    """A module in place of ``tensorflow_datasets``, with one data set of 20 + 10 images."""
    rng = np.random.default_rng(0)
    examples = [
        {"image": rng.integers(0, 256, (32, 32, 3), np.uint8), "label": np.int64(i % 10), "id": b""} for i in range(30)
    ]
    calls = []

    def builder(name, data_dir=None, file_format=None):
        def act(what):
            calls.append((what, name, data_dir, file_format))
            if fail == what:
                raise ConnectionError("no network:\n host unknown")

        def source(split):
            act("read")
            return Source(examples[:20] if split == "train" else examples[20:])

        return SimpleNamespace(
            is_prepared=lambda: prepared, download_and_prepare=lambda: act("prepare"), as_data_source=source
        )

    return SimpleNamespace(builder=builder, examples=examples, calls=calls)


def test_larger_images_are_kept_beside_small_ones(monkeypatch, tmp_path):
    tfds = fake_tfds()
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    for _ in range(2):
        data = load_images("cifar10", 768, 10, str(tmp_path), size=16)
        assert load_images("cifar10", 192, 10, str(tmp_path))["test"]["image"].shape == (10, 192)
    blocks = np.stack([example["image"] for example in tfds.examples[20:]]).reshape(10, 16, 2, 16, 2, 3)
    np.testing.assert_allclose(data["test"]["image"], blocks.mean((2, 4)).reshape(10, 768) / 255, atol=1e-6)
    assert len(tfds.calls) == 4  # each split of each size once


def test_images_are_read_resized_and_cached(monkeypatch, tmp_path):
    tfds = fake_tfds()
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    data = load_images("cifar10", 192, 10, str(tmp_path))
    assert {split: arrays["image"].shape for split, arrays in data.items()} == {
        "train": (16, 192),
        "valid": (4, 192),
        "test": (10, 192),
    }
    blocks = np.stack([example["image"] for example in tfds.examples]).reshape(30, 8, 4, 8, 4, 3).astype(np.float64)
    expected = blocks[:, :, 1:3, :, 1:3].mean((2, 4)).reshape(30, 192) / 255
    images = np.concatenate([data[split]["image"] for split in ("train", "valid", "test")])
    labels = np.concatenate([data[split]["label"] for split in ("train", "valid", "test")])
    np.testing.assert_allclose(images, expected, atol=1e-6)
    np.testing.assert_array_equal(labels, np.arange(30) % 10)
    assert images.dtype == np.float32 and labels.dtype == np.int32
    assert {what for what, *_ in tfds.calls} == {"read"}  # nothing was downloaded

    # A cached data set needs neither TensorFlow Datasets nor Pillow.
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    for data_dir in (None, str(tmp_path)):
        again = load_images("cifar10", 192, 10, data_dir)
        assert jax.tree.all(jax.tree.map(np.array_equal, dict(again), dict(data)))


def test_cached_arrays_of_another_data_set_are_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake_tfds())
    load_images("cifar10", 192, 10)
    with pytest.warns(UserWarning, match="made anew"), pytest.raises(ValueError, match=r"labels are not in 0\.\.4"):
        load_images("cifar10", 192, 5)
    with pytest.warns(UserWarning, match="made anew"), pytest.raises(ValueError, match=r"expected \(n, 64\)"):
        load_images("cifar10", 64, 10)


def test_unprepared_data_set_is_prepared_as_array_record(monkeypatch, tmp_path):
    tfds = fake_tfds(prepared=False)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    monkeypatch.setitem(sys.modules, "tensorflow", SimpleNamespace())
    load_images("cifar10", 192, 10, str(tmp_path))
    assert tfds.calls[0] == ("prepare", "cifar10", str(tmp_path), "array_record")


def expect_help(reason, data_dir=None):
    with pytest.raises(DataError, match=reason) as error:
        load_images("cifar10", 192, 10, data_dir)
    message = str(error.value)
    assert "\n" not in message
    for part in ("pip install 'gmn_lopt[datasets]' tensorflow", "tfds.builder('cifar10'", "--data-dir"):
        assert part in message
    return message


def test_missing_tensorflow_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    expect_help("tensorflow_datasets")


def test_unprepared_without_tensorflow_fails_before_the_download(monkeypatch):
    tfds = fake_tfds(prepared=False)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    expect_help("not prepared there, and preparing it needs TensorFlow")
    assert not tfds.calls


@pytest.mark.parametrize("fail", ["prepare", "read"])
def test_failing_download_or_read(monkeypatch, cache, tmp_path, fail):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake_tfds(prepared=False, fail=fail))
    monkeypatch.setitem(sys.modules, "tensorflow", SimpleNamespace())
    message = expect_help("no network: host unknown", str(tmp_path))
    assert f"data_dir='{tmp_path}'" in message
    assert not cache.exists()  # nothing half made is kept


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is here: would download")
def test_empty_data_directory(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    expect_help("not prepared there, and preparing it needs TensorFlow", str(tmp_path))


@needs_real_data
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name, side, classes, sizes",
    [
        ("fashion_mnist", 28, 10, (60_000, 10_000)),
        ("cifar10", 32, 10, (50_000, 10_000)),
        ("cifar100", 32, 100, (50_000, 10_000)),
    ],
)
def test_real_images(name, side, classes, sizes):
    pytest.importorskip("tensorflow_datasets", reason="reading real data needs the extra [datasets]")
    sources = read_splits(name, str(REAL), Path(), lambda source: source)
    assert tuple(len(source) for source in sources.values()) == sizes
    some = Source(sources["test"].__getitems__(list(range(60))))
    images, labels = read(some, name, chunk=25)
    raw = np.stack([example["image"] for example in some])
    assert raw.shape[1:3] == (side, side)
    np.testing.assert_allclose(images.reshape(60, 8, 8, -1) * 255, naive_bilinear(raw, 8), atol=1e-3)
    np.testing.assert_array_equal(labels, [example["label"] for example in some])
    assert labels.min() >= 0 and 5 < labels.max() < classes and len(set(labels.tolist())) > 5
    assert images.max() > 0.5 and images.std() > 0.1  # scaled by 255, once
