"""What a user names as ``learned_optimization:MODULE:NAME``: found, and made with the settings."""

import difflib
import importlib
import sys
from collections.abc import Mapping
from typing import Any

import jax

from gmn_lopt.util.errors import first_line

PREFIX = "learned_optimization:"

# What JAX called these when learned_optimization 0.0.1, the one on PyPI, was written; its current source does not.
FORMER_NAMES: Mapping[str, Any] = {
    "ShapedArray": jax.core.ShapedArray,
    "tree_flatten": jax.tree.flatten,
    "tree_leaves": jax.tree.leaves,
    "tree_map": jax.tree.map,
    "tree_multimap": jax.tree.map,
    "tree_structure": jax.tree.structure,
    "tree_unflatten": jax.tree.unflatten,
}


def module_of(place: str) -> str:
    """The module that ``learned_optimization:MODULE:NAME`` names.

    Example:
        >>> module_of("learned_optimization:learned_optimization.tasks.quadratics:QuadraticTask")
        'learned_optimization.tasks.quadratics'
    """
    return place.removeprefix(PREFIX).partition(":")[0]


def make(place: str, settings: Mapping[str, Any]) -> Any:
    """Import what is named, and call it with the settings; what is no class or function is taken as it is.

    Beside that, names are put back into ``jax`` that it no longer has and version 0.0.1 calls. Modules of Python's own
    library are refused.

    Args:
        place: ``learned_optimization:MODULE:NAME``.
        settings: arguments by name.

    Raises:
        ValueError: in one line, if the module cannot be imported, has no such name, or refuses the settings.

    Example:
        >>> make("learned_optimization:jax.numpy:ones", {"shape": 2})
        Array([1., 1.], dtype=float32)
        >>> make("learned_optimization:jax.numpy:onse", {})
        Traceback (most recent call last):
        ValueError: module jax.numpy has no onse; did you mean ones or insert or choose?
    """
    module, _, name = place.removeprefix(PREFIX).partition(":")
    if not name.isidentifier() or name.startswith("_") or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(
            f"write {PREFIX}MODULE:NAME, such as {PREFIX}learned_optimization.tasks.quadratics:QuadraticTask"
        )
    if module.split(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{module} is of Python's own library, where there are no tasks or optimizers")
    found = _find(module, name)
    if not callable(found) or _has_methods(found):
        if settings:
            raise ValueError(f"{name} is an object, made already: it takes no settings")
        return found
    try:
        return found(**settings)
    except Exception as error:  # whatever their code may raise
        raise ValueError(f"{name} cannot be made: {type(error).__name__}: {first_line(error)}") from error


def _find(module: str, name: str) -> Any:
    for former, value in FORMER_NAMES.items():
        if not hasattr(jax, former):
            setattr(jax, former, value)
    try:
        home = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{module} cannot be imported: {first_line(error)}; docs/learned_optimization.md says how it is installed"
        ) from error
    except Exception as error:  # old code may fail in many ways where its packages have changed
        raise ValueError(f"{module} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    if not hasattr(home, name):
        near = difflib.get_close_matches(name, [n for n in dir(home) if not n.startswith("_")], 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"module {module} has no {name}{hint}")
    return getattr(home, name)


def _has_methods(found: Any) -> bool:
    """Whether it is one of their objects, and not what makes one."""
    return not isinstance(found, type) and any(hasattr(found, name) for name in ("init", "task_fn"))
