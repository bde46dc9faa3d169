"""Splits of a fixed size from their data sets, which are iterators of batches without end."""

import sys
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

SPLITS = {"train": "train", "valid": "outer_valid", "test": "test"}
"""Their splits by ours: ``valid`` is what the meta-loss may be taken on, and the tuning of baselines."""


def draw(datasets: Any, batches: int) -> dict[str, PyTree]:
    """Take batches from each split, and put them behind each other.

    Their iterators shuffle with NumPy's and TensorFlow's generators, which are seeded here, so that each process has
    the same data; NumPy's has its state again afterwards.

    Args:
        datasets: their ``Datasets``.
        batches: of the training split; the others give a tenth.

    Returns:
        ``"train"``, ``"valid"`` and ``"test"``: each leaf ``[batches * batch size, ...]``, a NumPy array.

    Raises:
        ValueError: in one line, if a split has fewer batches, leaves have no common first axis, splits have batches
            of different sizes, or batches are not like the data set's ``abstract_batch``.
    """
    counts = {ours: batches if ours == "train" else max(1, batches // 10) for ours in SPLITS}
    before = np.random.get_state()
    try:
        drawn = {
            ours: _draw_split(datasets, theirs, counts[ours], seed)
            for seed, (ours, theirs) in enumerate(SPLITS.items())
        }
    finally:
        np.random.set_state(before)
    sizes = {ours: jax.tree.leaves(split)[0].shape[0] // counts[ours] for ours, split in drawn.items()}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{SPLITS[ours]} {size}" for ours, size in sizes.items())
        raise ValueError(f"the splits have batches of different sizes: {shown}")
    return drawn


def _draw_split(datasets: Any, split: str, batches: int, seed: int) -> PyTree:
    np.random.seed(seed)
    if "tensorflow" in sys.modules:
        sys.modules["tensorflow"].random.set_seed(seed)
    iterator, found = iter(datasets.split(split)), list[PyTree]()
    for taken in range(batches):
        try:
            batch = jax.tree.map(np.asarray, next(iterator))
        except StopIteration:
            raise ValueError(f"the split {split} ends after {taken} batches; give batches={max(taken, 1)}") from None
        _check(batch, datasets, split, found[0] if found else None)
        found.append(batch)
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *found)


def _check(batch: PyTree, datasets: Any, split: str, first: PyTree) -> None:
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(f"the batches of the split {split} have no common first axis of examples: {_shown(batch)}")
    expected = getattr(datasets, "abstract_batch", None) if first is None else first
    if expected is not None and _shown(expected) != _shown(batch):
        what = "abstract_batch says" if first is None else "the first was"
        raise ValueError(f"a batch of the split {split} is {_shown(batch)}, but {what} {_shown(expected)}")


def _shown(batch: PyTree) -> str:
    """The names, types and shapes of leaves, as JAX has them: of 64 bits there are none unless asked for."""
    leaves = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} "
        f"{jax.dtypes.canonicalize_dtype(leaf.dtype)}{list(leaf.shape)}".strip()
        for path, leaf in jax.tree.leaves_with_path(batch)
    ]
    return ", ".join(leaves)
