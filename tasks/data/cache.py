"""Arrays that are costly to make are made once and kept as ``NAME.npz`` in a cache directory."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gmn_lopt.util.arrays import read_arrays, write_arrays
from gmn_lopt.util.errors import FileError, first_line

Arrays = dict[str, np.ndarray]


class DataError(RuntimeError):
    """A task's data is not there and could not be brought. The message is one line with the commands that bring it."""


def cache_dir() -> Path:
    """``$GMN_LOPT_CACHE``, else ``$XDG_CACHE_HOME/gmn_lopt``, else ``~/.cache/gmn_lopt``."""
    if chosen := os.environ.get("GMN_LOPT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gmn_lopt"


def cache_path(name: str) -> Path:
    """Where the arrays called ``name`` are kept."""
    return cache_dir() / f"{name}.npz"


def cached(
    name: str,
    version: int,
    build: Callable[[], Arrays],
    check: Callable[[Arrays], None],
    source: str | None = None,
) -> Arrays:
    """Read arrays from the cache, or build and keep them.

    Nothing about the cache itself ends a run: a file that cannot be used is made anew, and arrays that cannot be
    written are used without being kept, both with a warning.

    Args:
        name: the file's name, without ending.
        version: a file of another version is made anew. To be raised whenever ``build`` changes.
        build: makes the arrays.
        check: raises ValueError where the arrays are not what ``build`` makes.
        source: where the user asked the data to come from. A file made from elsewhere is made anew, so that the
            arrays are never other than asked for; None takes whatever is kept.
    """
    path = cache_path(name)
    if os.path.lexists(path):
        try:
            return _read(path, version, check, source)
        except FileError as error:
            warnings.warn(f"{path} is not used but made anew: {error}", stacklevel=2)
    arrays = build()
    check(arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(path, {**arrays, "version": version, "source": source or ""})
    except OSError as error:
        reason = error.strerror or error
        warnings.warn(f"{path} cannot be written ({reason}), so this work is done again next time", stacklevel=2)
    return arrays


def _read(path: Path, version: int, check: Callable[[Arrays], None], source: str | None) -> Arrays:
    arrays = read_arrays(path)
    kept_version, kept_source = str(arrays.pop("version", "")), str(arrays.pop("source", ""))
    if kept_version != str(version):
        raise FileError(f"it has version {kept_version}, this code reads version {version}")
    if source is not None and kept_source != source:
        raise FileError(f"it was made from {kept_source or 'the default data directory'}, not from {source}")
    try:
        check(arrays)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise FileError(first_line(error)) from None
    return arrays
