"""Names of parameters: their paths in the tree, alike for all trees that hold the same parameters."""

import re
from typing import Any

import jax


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf, as :func:`jax.tree_util.keystr` writes its path.

    A ``nnx.Variable`` is a node with the array in ``value``; with or without it, the parameter is the same.
    """
    inside = bool(path) and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return jax.tree_util.keystr(path[:-1] if inside else path)


def comparable(name: str) -> str:
    """A name with attributes as keys, for an nnx model and its state hold the same parameters."""
    return re.sub(r"\.([^\W\d]\w*)", r"['\1']", name)
