"""Writing files that are never seen half written."""

import os
from pathlib import Path


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
