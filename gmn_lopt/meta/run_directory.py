"""The directory of one meta-training run: settings, metrics, checkpoints, and the current optimizer."""

import contextlib
import errno
import fcntl
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from tensorboardX import SummaryWriter

from gmn_lopt.util.errors import first_line
from gmn_lopt.util.files import write_atomically

_CONFIG, _METRICS, _COMPLETE, _LOCK = "config.json", "metrics.jsonl", "COMPLETE", ".lock"


class RunError(Exception):
    """A run directory cannot be used as asked, or cannot be written. The message is one line."""


class RunDirectory:
    """A meta-training run on disk.

    ``config.json`` holds the settings, ``metrics.jsonl`` one line per logged meta-step, ``events/`` the same for
    TensorBoard, ``checkpoints/`` the states to resume from, ``COMPLETE`` says that the run has ended. Whatever is
    written replaces the old version at once or is appended, so that nothing saved is lost when the process is killed.

    Args:
        path: the directory; it is made if it does not exist.
        settings: the run's settings, JSON values.
        versions: of packages, and the hardware; to be read by people.
        resume: continue the run in ``path``, if there is one.
        free: names of settings that may change when a run is resumed.
        keep: number of latest checkpoints to keep.
        keep_period: checkpoints of meta-steps divisible by it are kept for good.

    Raises:
        RunError: the directory cannot be used: in use by another process, not writable, not empty without ``resume``,
            of a run with other settings, or not a run directory at all.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        versions: Mapping[str, str],
        resume: bool,
        free: Collection[str],
        keep: int,
        keep_period: int,
    ):
        self.path = path
        with contextlib.ExitStack() as stack:
            try:
                path.mkdir(parents=True, exist_ok=True)
                content = {entry.name for entry in path.iterdir() if entry.suffix != ".partial"} - {_LOCK}
                if content and not resume:
                    raise RunError(
                        f"--out {path} is not empty; add --resume to continue the run in it, or choose another"
                    )
                if content:
                    _compare(read_settings(path), settings, free, path)
                self._lock = stack.enter_context(_lock(path / _LOCK))
                self._open(settings, versions, keep, keep_period)
            except OSError as error:
                reason = error.strerror or error
                raise RunError(f"--out {path}: {reason}; choose a directory that can be written") from None
            stack.pop_all()  # all went well: the lock is held until the run is closed

    def _open(self, settings: Mapping[str, Any], versions: Mapping[str, str], keep: int, keep_period: int) -> None:
        path = self.path
        config = {"settings": dict(settings), "versions": dict(versions)}
        write_atomically(path / _CONFIG, json.dumps(config, indent=2).encode())
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_period,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            # Of several processes it is the first that has the directory; orbax shall not wait for the others.
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}),
        )
        (path / "checkpoints").mkdir(exist_ok=True)
        self._checkpoints = ocp.CheckpointManager((path / "checkpoints").absolute(), options=options)
        self.latest: int = self._checkpoints.latest_step() or 0
        self._metrics = self._open_metrics()
        self._events = SummaryWriter(str(path / "events"), purge_step=self.latest + 1)

    @property
    def complete(self) -> bool:
        """Whether the run has ended."""
        return (self.path / _COMPLETE).exists()

    def mark_complete(self, meta_step: int) -> None:
        """Say that the run has ended with this meta-step."""
        try:
            write_atomically(self.path / _COMPLETE, f"{meta_step}\n".encode())
        except OSError as error:
            raise RunError(f"cannot write {self.path / _COMPLETE}: {error.strerror}; checkpoints are intact") from None

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row of metrics; numbers that are not finite become null.

        Args:
            row: ``meta_step``, and numbers, strings and lists of numbers.
        """
        try:
            self._metrics.write(json.dumps(_finite(row)) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.path / _METRICS}: {error.strerror}; checkpoints are intact") from None
        for name, value in row.items():
            for key, number in _scalars(name, value).items():
                if name != "meta_step" and math.isfinite(number):
                    self._events.add_scalar(key, number, row["meta_step"])

    def save(self, meta_step: int, state: PyTree) -> None:
        """Save a checkpoint: a pytree of arrays.

        Raises:
            RunError: it could not be written; earlier checkpoints are intact.
        """
        try:
            self._checkpoints.save(meta_step, args=ocp.args.StandardSave(state), force=True)
            self._checkpoints.wait_until_finished()
        except Exception as error:  # orbax and tensorstore raise many kinds, a full disk among them
            raise RunError(
                f"cannot save the checkpoint of meta-step {meta_step} in {self.path}: {first_line(error)}; earlier "
                "checkpoints are intact, continue with --resume"
            ) from None
        self.latest = meta_step

    def restore(self, like: PyTree) -> PyTree:
        """Read the latest checkpoint.

        Args:
            like: a state of the same shapes and shardings.

        Raises:
            RunError: it cannot be read, or was written for another state.
        """
        try:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
            return self._checkpoints.restore(self.latest, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # as many kinds as in save
            raise RunError(
                f"cannot read the checkpoint of meta-step {self.latest} in {self.path}: {first_line(error)}; delete "
                f"{self.path / 'checkpoints' / str(self.latest)} to continue from the one before"
            ) from None

    def close(self) -> None:
        """Close all files and let go of the directory."""
        self._metrics.close()
        self._events.close()
        self._checkpoints.close()
        self._lock.close()

    def _open_metrics(self) -> TextIO:
        """Open the metrics for appending, without the lines written after the latest checkpoint."""
        file = self.path / _METRICS
        kept = []
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                break  # the line that was being written when the process was killed
            if row["meta_step"] <= self.latest:
                kept.append(line + "\n")
        write_atomically(file, "".join(kept).encode())
        return file.open("a")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of the run in a directory.

    Raises:
        RunError: there is no run in it.
    """
    try:
        settings = json.loads((path / _CONFIG).read_text())["settings"]
        if isinstance(settings, dict):
            return settings
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RunError(f"--out {path} is not the directory of a run: it has no readable {_CONFIG}; choose another")


def _lock(file: Path) -> TextIO:
    """Hold a lock as long as the file is open; the system lets go of it however the process ends."""
    stream = file.open("a")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise RunError(f"--out {file.parent} is in use by another process; wait for it, or choose another") from None
    return stream


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str], path: Path) -> None:
    old, new = ({name: x for name, x in settings.items() if name not in free} for settings in (old, new))
    if found := "; ".join(differences(old, new)):
        raise RunError(f"--resume: the run in {path} has other settings ({found}); leave them out to continue it")


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two nests of JSON values differ, as ``NAME was OLD, now NEW``; of different classes, their names."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("name") == new.get("name"):
        prefix = f"{name}." if name else ""
        keys = sorted({*old, *new})
        return [text for key in keys for text in differences(old.get(key), new.get(key), f"{prefix}{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [text for i, (a, b) in enumerate(zip(old, new)) for text in differences(a, b, f"{name}[{i}]")]
    shown = [x["name"] if isinstance(x, dict) and "name" in x else repr(x) for x in (old, new)]
    return [] if old == new else [f"{name} was {shown[0]}, now {shown[1]}"]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(name: str, value: Any) -> dict[str, float | int]:
    """The numbers of a metric, each with a name."""
    if isinstance(value, list):
        width = len(str(len(value)))
        return {f"{name}/{i:0{width}d}": number for i, number in enumerate(value) if number is not None}
    return {name: value} if isinstance(value, int | float) else {}
