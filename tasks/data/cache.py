"""Arrays that are costly to make are made once and kept as ``NAME.npz`` in a cache directory."""

import io
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gmn_lopt.util.files import write_atomically

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
    try:
        return _read(path, version, check, source)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(f"{path} is not used but made anew: {error}", stacklevel=2)
    arrays = build()
    check(arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez(content, **arrays, version=version, source=source or "")  # type: ignore[arg-type]
        write_atomically(path, content.getvalue())
    except OSError as error:
        reason = error.strerror or error
        warnings.warn(f"{path} cannot be written ({reason}), so this work is done again next time", stacklevel=2)
    return arrays


def _read(path: Path, version: int, check: Callable[[Arrays], None], source: str | None) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    kept_version, kept_source = int(arrays.pop("version")), str(arrays.pop("source"))
    if kept_version != version:
        raise ValueError(f"it has version {kept_version}, this code reads version {version}")
    if source is not None and kept_source != source:
        raise ValueError(f"it was made from {kept_source or 'the default data directory'}, not from {source}")
    check(arrays)
    return arrays
