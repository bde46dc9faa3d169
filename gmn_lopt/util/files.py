"""Files: written so that they are never seen half, and read only if they are what they should be."""

import contextlib
import json
import os
import stat
import time
from collections import Counter
from pathlib import Path
from typing import Any

from gmn_lopt.util.errors import FileError, first_line

LARGEST_JSON = 4 * 2**20  # bytes
DEEPEST_JSON = 64
AN_HOUR = 3600


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
    except OSError as error:  # about the file that is asked for, not about the temporary one
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_partials(directory: Path) -> None:
    """Remove what :func:`write_atomically` left in a directory when its process was killed: no write takes an hour."""
    for file in directory.glob(".*.partial"):
        with contextlib.suppress(OSError):  # another process may be doing the same
            if time.time() - file.stat().st_mtime > AN_HOUR:
                file.unlink()


def read_regular(file: Path, most: int, directory: int | None = None) -> bytes:
    """Read a regular file of at most so many bytes; a pipe or a device would wait, or never end.

    Args:
        file: its path.
        most: bytes that it may have.
        directory: descriptor of the directory in which it is looked for, whatever has its path now.

    Raises:
        FileError: in one line, if it is missing, no regular file, too large, or cannot be read.

    Example:
        >>> read_regular(Path("nowhere"), most=10)
        Traceback (most recent call last):
        gmn_lopt.util.errors.FileError: nowhere is missing
    """
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(file if directory is None else file.name, flags, dir_fd=directory)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FileError(f"{file} is not a regular file")
            if status.st_size > most:
                raise FileError(f"{file} has {status.st_size} bytes, more than the {most} that it may have")
            with open(descriptor, "rb", closefd=False) as stream:
                return stream.read(status.st_size)  # so much memory is taken, whatever there is to read
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
    return parse_object(read_regular(file, most), file)


def parse_object(content: bytes, file: Path) -> dict[str, Any]:
    """Parse the JSON object that a file holds; raises like :func:`read_json`."""
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
