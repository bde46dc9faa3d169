"""Compiled programs are kept between runs of the commands."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

LARGEST = 2**30  # bytes that are kept, the latest ones


def keep_compiled() -> None:
    """Let JAX keep what takes it more than a second to compile, unless the user has chosen a place or does not want it.

    In ``$XDG_CACHE_HOME/gmn_lopt``, or ``~/.cache/gmn_lopt``, which only the user may read: programs are run as they
    are found. Those of a processor are its machine code, so each kind of machine has a directory of its own. Where
    nothing can be written, nothing is kept. ``JAX_COMPILATION_CACHE_DIR`` sets another place, and
    ``JAX_ENABLE_COMPILATION_CACHE=0`` keeps none (https://docs.jax.dev/en/latest/persistent_compilation_cache.html).
    """
    chosen: dict[str, Any] = jax.config.values
    if chosen["jax_compilation_cache_dir"] or not chosen["jax_enable_compilation_cache"]:
        return
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gmn_lopt" / f"compiled-{_machine()}"
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o700)
        if not os.access(place, os.W_OK):
            return
        _remove_oldest(place, LARGEST)
        jax.config.update("jax_compilation_cache_dir", str(place))


def _machine() -> str:
    """The instructions of the processor, as Linux tells them, in short."""
    known = platform.machine() + platform.processor()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        known += "".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))}))
    return hashlib.sha256(known.encode()).hexdigest()[:12]


def _remove_oldest(place: Path, largest: int) -> None:
    files = [(file.stat(), file) for file in place.iterdir() if file.is_file()]
    kept = 0
    for status, file in sorted(files, key=lambda pair: pair[0].st_mtime, reverse=True):
        kept += status.st_size
        if kept > largest:
            file.unlink(missing_ok=True)
