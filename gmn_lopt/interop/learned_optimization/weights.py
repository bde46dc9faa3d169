"""Meta-parameters that learned_optimization saved: flax's msgpack, which holds arrays and nothing executable."""

from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gmn_lopt.util.errors import FileError, first_line
from gmn_lopt.util.files import read_regular

LARGEST = 2**28  # bytes
INSIDE = "params"  # of a checkpoint of theirs, which holds a generation's number and a step, too


def read_weights(file: str | Path, template: PyTree) -> PyTree:
    """Read meta-parameters from a file that their ``save_state`` or outer training wrote.

    Args:
        file: its path.
        template: meta-parameters of the optimizer, as ``init`` draws them.

    Returns:
        Those of the file, in the form of the template.

    Raises:
        ValueError: in one line, if the file cannot be read, or does not hold these.
    """
    file = Path(file)
    try:
        found = flax.serialization.msgpack_restore(read_regular(file, LARGEST))
    except FileError:
        raise
    except Exception as error:  # msgpack, and what arrays are made by, fail in many ways
        raise ValueError(f"{file} is damaged or not flax's msgpack: {first_line(error)}") from error
    paths, treedef = jax.tree_util.tree_flatten_with_path(template)
    names = [tuple(_name(key) for key in path) for path, _ in paths]
    if isinstance(found, dict) and INSIDE in found and not any(name[:1] == (INSIDE,) for name in names):
        found = found[INSIDE]
    return jax.tree.unflatten(treedef, [_leaf(file, found, name, x) for name, (_, x) in zip(names, paths)])


def _leaf(file: Path, found: Any, name: tuple[str, ...], expected: Any) -> jax.Array:
    for key in name:
        if not isinstance(found, dict) or key not in found:
            raise ValueError(f"{file} lacks {'/'.join(name)}, which the optimizer has")
        found = found[key]
    array, shape, dtype = np.asarray(found), jnp.shape(expected), jnp.result_type(expected)
    if array.dtype.kind not in "biuf" or array.shape != shape:
        raise ValueError(f"{file} has {'/'.join(name)} as {array.dtype}{list(array.shape)}, not {dtype}{list(shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{file} has {'/'.join(name)} with values that are not finite")
    return jnp.asarray(array, dtype)


def _name(key: Any) -> str:
    """As flax names it: a dictionary's key, a list's index, a field."""
    return jax.tree_util.keystr((key,), simple=True)
