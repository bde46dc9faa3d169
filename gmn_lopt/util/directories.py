"""Directories that are replaced as a whole, and what killed processes leave of them and of files."""

import contextlib
import ctypes
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from gmn_lopt.util.errors import FileError, reason_of
from gmn_lopt.util.files import AN_HOUR, read_regular, write_atomically

READ_TIMES = 10  # a directory may be replaced while it is read
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
# What a process that was killed leaves behind: partial files of write_atomically; directories that are new or replaced.
_LITTER = re.compile(r"\.(?P<name>.+)\.(\d+\.partial|new-\w{8}|(?P<old>old-\w{8}))")


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a directory of files in place of the one that is there, so that a reader never sees half of it.

    Raises:
        OSError: it cannot be written; the old one is intact.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path  # a link stays, and what it leads to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(path)
    new = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new-"))
    try:
        for name, content in files.items():
            write_atomically(new / name, content)
        new.chmod(0o755)
        _replace_directory(new, path)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _remove_unfinished(path: Path) -> None:
    """Remove what :func:`write_directory` left beside this path when its process was killed: no write takes an hour."""
    with contextlib.suppress(OSError):  # another process may be doing the same
        for entry in path.parent.iterdir():
            match = _LITTER.fullmatch(entry.name)
            unfinished = match and match["name"] == path.name and not match["old"]
            if unfinished and time.time() - entry.stat().st_mtime > AN_HOUR:
                shutil.rmtree(entry)


def _replace_directory(new: Path, path: Path) -> None:
    """Give ``new`` the name ``path``; what had it is removed."""
    if not path.exists():
        new.rename(path)
        return
    try:
        _exchange(new, path)
        old = new
    except OSError:
        old = _rename_twice(new, path)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Let two directories have each other's name, at once; raises OSError where that cannot be done."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _rename_twice(new: Path, path: Path) -> Path:
    """What :func:`_exchange` does, where the file system (of a network, mostly) or the system cannot.

    A directory cannot be renamed onto a full one, so the old one steps aside first: :func:`read_directory` finds it
    there, and :func:`remove_litter` brings it back. Returns where it is.
    """
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old-"))
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    return old


def read_directory(path: Path, sizes: Mapping[str, int]) -> dict[str, bytes]:
    """Read files of one directory, which :func:`write_directory` may replace meanwhile: all are of one version.

    Args:
        path: the directory.
        sizes: the names of the files, and the bytes that each may have.

    Raises:
        FileError: in one line, if it is missing, or one of the files is or cannot be read (:func:`read_regular`).
    """
    for left in reversed(range(READ_TIMES)):
        place = path if os.path.lexists(path) else stepped_aside(path) or path
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:  # ValueError: no file system takes the name
            if isinstance(error, FileNotFoundError) and left:
                continue
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {reason_of(error)}"
            raise FileError(f"{path} {reason}") from None
        try:
            return {name: read_regular(path / name, most, descriptor) for name, most in sizes.items()}
        except FileError:
            if not left or _is_at(path, descriptor):
                raise
        finally:
            os.close(descriptor)
    raise AssertionError


def stepped_aside(path: Path) -> Path | None:
    """Where a directory is that another is just replacing, or was, when that process was killed; None: nowhere."""
    try:
        names = sorted(os.listdir(path.parent))
    except (OSError, ValueError):  # there is no such place, or cannot be
        return None
    found = [match for name in names if (match := _LITTER.fullmatch(name)) and match["name"] == path.name]
    places = [path.with_name(match.string) for match in found if match["old"]]
    return next((place for place in places if _is_full(place)), None)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path leads to the directory that is open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _is_full(directory: Path) -> bool:
    try:
        return any(directory.iterdir())
    except OSError:  # it has been removed, or is no directory
        return False


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
        elif found["old"] and _is_full(entry) and not (directory / found["name"]).exists():
            entry.rename(directory / found["name"])
        else:
            shutil.rmtree(entry)
