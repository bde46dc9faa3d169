"""Results on disk: one file per finished unit of work, so that an interrupted evaluation goes on where it stopped."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gmn_lopt.util.arrays import read_arrays, write_arrays
from gmn_lopt.util.errors import FileError, UsageError
from gmn_lopt.util.files import read_json, remove_partials, write_atomically


class Results:
    """A directory of finished results that all belong to one configuration.

    Args:
        directory: made if it does not exist. Holds ``settings.json`` and one ``.npz`` per finished unit.
        settings: what the results depend on, beside the optimizer. JSON values.

    Raises:
        UsageError: if the directory cannot be written or holds results of other settings; the message lists the
            differences.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]):
        self.directory = directory
        settings = json.loads(json.dumps(settings))
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {directory}: {error.strerror}; choose another --out") from None
        for place in (directory, directory.parent):
            remove_partials(place)
        file = directory / "settings.json"
        if any(directory.glob("*.npz")):
            try:
                before = read_json(file)
                changed = [k for k in sorted(before.keys() | settings.keys()) if before.get(k) != settings.get(k)]
                differences = [f"{key} was {before.get(key)!r}, is {settings.get(key)!r}" for key in changed]
            except FileError as error:
                raise UsageError(f"{error}: choose another --out, or delete {directory}") from None
            if differences:
                raise UsageError(
                    f"{directory} holds results of another configuration ({'; '.join(differences)}): choose another "
                    "--out, or delete it"
                )
        write_atomically(file, json.dumps(settings, indent=2).encode())

    def load(self, name: str, fingerprint: str) -> dict[str, np.ndarray] | None:
        """The arrays saved under a name, or None if there are none of this fingerprint."""
        try:
            loaded = read_arrays(self._file(name))
        except FileError:
            return None
        found = loaded.pop("fingerprint", None)
        return loaded if found is not None and str(found) == fingerprint else None

    def save(self, name: str, fingerprint: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Save arrays under a name, all or nothing, in place of what was there."""
        write_arrays(self._file(name), {"fingerprint": fingerprint, **arrays})

    def _file(self, name: str) -> Path:
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:60]
        return self.directory / f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.npz"
