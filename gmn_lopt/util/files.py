"""Files: written so that they are never seen half, and read only if they are what they should be."""

import json
import os
import re
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gmn_lopt.util.errors import FileError, first_line

LARGEST_JSON = 4 * 2**20  # bytes
DEEPEST_JSON = 64
# What a process that was killed leaves behind: the partial files and new directories below, and replaced directories.
_LITTER = re.compile(r"\.(?P<name>.+)\.(\d+\.partial|new-\w{8}|(?P<old>old-\w{8}))")


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that at any moment it is either the old one or the new one, whole.

    Raises:
        OSError: the file cannot be written; the old one is intact.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a directory of files in place of the one that is there, so that a reader never sees half of it.

    Raises:
        OSError: it cannot be written; the old one is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new-"))
    try:
        for name, content in files.items():
            write_atomically(new / name, content)
        new.chmod(0o755)
        _replace_directory(new, path)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _replace_directory(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; a directory cannot be renamed onto a full one, so the old one steps aside first."""
    if not path.exists():
        new.rename(path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old-"))
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def is_litter(name: str) -> bool:
    """Whether a file or directory of this name was being written when its process ended.

    Example:
        >>> is_litter(".config.json.4711.partial"), is_litter("config.json")
        (True, False)
    """
    return _LITTER.fullmatch(name) is not None


def remove_litter(directory: Path) -> None:
    """Remove what killed processes left in a directory that no other process writes to.

    A directory that had stepped aside, and was not replaced any more, comes back.

    Raises:
        OSError: it cannot be removed.
    """
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        found = _LITTER.fullmatch(entry.name)
        if found is None:
            continue
        if not entry.is_dir() or entry.is_symlink():
            entry.unlink()
        elif found["old"] and any(entry.iterdir()) and not (directory / found["name"]).exists():
            entry.rename(directory / found["name"])
        else:
            shutil.rmtree(entry)


def read_regular(file: Path, most: int) -> bytes:
    """Read a regular file of at most so many bytes; a pipe or a device would wait, or never end.

    Raises:
        FileError: in one line, if it is missing, no regular file, too large, or cannot be read.

    Example:
        >>> read_regular(Path("nowhere"), most=10)
        Traceback (most recent call last):
        gmn_lopt.util.errors.FileError: nowhere is missing
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FileError(f"{file} is not a regular file")
            if status.st_size > most:
                raise FileError(f"{file} has {status.st_size} bytes, more than the {most} that it may have")
            with open(descriptor, "rb", closefd=False) as stream:
                return stream.read(most)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise FileError(f"{file} is missing") from None
    except OSError as error:
        raise FileError(f"{file} cannot be read: {error.strerror or error}") from None


def read_json(file: Path, most: int = LARGEST_JSON) -> dict[str, Any]:
    """Read a JSON object from a regular file; see :func:`parse_json`.

    Raises:
        FileError: in one line that names the file, if it is not there, or does not hold one.
    """
    content = read_regular(file, most)
    try:
        found = parse_json(content)
    except ValueError as error:
        raise FileError(f"{file} is damaged or not JSON: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise FileError(f"{file} is damaged: it does not hold an object")
    return found


def parse_json(content: bytes) -> Any:
    """Parse JSON as the standard has it: no NaN, every entry of an object once; and not nested without end.

    Raises:
        ValueError: in one line, what is wrong with it.

    Example:
        >>> parse_json(b'{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ValueError: the entry 'a' is there twice
    """
    try:
        found = json.loads(content.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    layer = [found]
    for _ in range(DEEPEST_JSON):
        layer = [x for value in layer for x in _items(value)]
        if not layer:
            return found
    raise ValueError("it is nested too deeply")


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the entry {ascii(counts.most_common(1)[0][0])[:40]} is there twice")
    return found
