"""Files of named arrays (``.npz``), read only if they are what was written."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from gmn_lopt.util.errors import FileError, first_line
from gmn_lopt.util.files import read_regular, remove_partials, write_atomically

LARGEST = 2**34  # bytes
# What damaged archives raise.
DAMAGED = (
    ValueError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    zipfile.BadZipFile,
)


def write_arrays(file: Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Write arrays, or numbers and text, all or nothing, in place of what was there.

    What writes into this directory left behind when they were killed is removed.

    Raises:
        OSError: the file cannot be written; the old one is intact.
    """
    content = io.BytesIO()
    np.savez(content, **{name: np.asarray(x) for name, x in arrays.items()})  # type: ignore[arg-type]
    remove_partials(file.parent)
    write_atomically(file, content.getvalue())


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Read what :func:`write_arrays` wrote; nothing in it is executed.

    Raises:
        FileError: in one line that names the file, if it is not there, or damaged.

    Example:
        >>> write_arrays(Path("x.npz"), {"x": np.arange(3), "version": 1})
        >>> read_arrays(Path("x.npz"))
        {'x': array([0, 1, 2]), 'version': array(1)}
    """
    content = read_regular(file, LARGEST)
    try:
        parts = zipfile.ZipFile(io.BytesIO(content)).infolist()  # which are not compressed
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(x.file_size for x in parts) > len(
            content
        ):
            raise ValueError("it would become larger than the file")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except DAMAGED as error:
        raise FileError(f"{file} is damaged: {first_line(error)}") from None
