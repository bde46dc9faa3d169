"""The directory of one meta-training run: settings, metrics, checkpoints, and the current optimizer."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from gmn_lopt.meta import metrics
from gmn_lopt.meta.processes import from_first, is_first
from gmn_lopt.meta.stages import MOST_META_STEPS
from gmn_lopt.util.directories import is_litter, remove_litter
from gmn_lopt.util.errors import FileError, OneLine, first_line
from gmn_lopt.util.files import read_json, read_regular, write_atomically
from gmn_lopt.util.quiet import quiet

_CONFIG, _COMPLETE, _LOCK, _CHECKSUMS = "config.json", "COMPLETE", ".lock", "checksums.json"
OVERHEAD = 2**20  # bytes of a checkpoint beside its arrays, at most


class RunError(OneLine):
    """A run directory cannot be used as asked, or cannot be written."""


class RunDirectory:
    """A meta-training run on disk.

    ``config.json`` holds the settings, ``metrics.jsonl`` one line per logged meta-step, ``events/`` the same for
    TensorBoard, ``checkpoints/`` the states to resume from, ``checksums.json`` their checksums, ``COMPLETE`` says that
    the run has ended. Whatever is written replaces the old version at once or is appended, so that nothing saved is
    lost when the process is killed.

    Of several processes only the first reads and writes; states are gathered in it and sent from it. A checkpoint
    does not know of devices: any number of processes and devices can resume from it. All methods but :meth:`log` must
    be called by all processes, and what fails in the first fails in all.

    Args:
        path: the directory; it is made if it does not exist.
        settings: the run's settings, JSON values.
        versions: of packages, and the hardware; to be read by people.
        resume: continue the run in ``path``, if there is one.
        free: names of settings that may change when a run is resumed.
        keep: number of latest checkpoints to keep.
        keep_period: checkpoints of meta-steps divisible by it are kept for good.

    Attributes:
        latest: meta-step of the latest checkpoint; 0: there is none.
        complete: the meta-step with which the run has ended; 0: it has not.

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
        self.path, self._files = path, contextlib.ExitStack()

        def open_() -> np.ndarray:
            with contextlib.ExitStack() as files:
                try:
                    self._claim(files, settings, resume, free)
                    latest = self._open(
                        files, {"settings": dict(settings), "versions": dict(versions)}, keep, keep_period
                    )
                    complete = _read_complete(path / _COMPLETE)
                except FileError as error:
                    raise RunError(f"--out {path}: {error}") from None
                except OSError as error:
                    where = f"{error.filename}: " if error.filename not in (None, str(path)) else ""
                    reason = f"{where}{error.strerror or first_line(error)}"
                    raise RunError(f"--out {path}: {reason}; choose a directory that can be written") from None
                self._files = files.pop_all()  # all went well: the lock is held until the run is closed
            return np.array([latest, complete], np.uint32)

        found = _in_first(open_)
        latest, complete = from_first(np.zeros(2, np.uint32) if found is None else found)
        self.latest, self.complete = int(latest), int(complete)

    def _claim(
        self, files: contextlib.ExitStack, settings: Mapping[str, Any], resume: bool, free: Collection[str]
    ) -> None:
        path = self.path
        path.mkdir(parents=True, exist_ok=True)
        if holds_run(path):
            if not resume:
                raise RunError(f"--out {path} is not empty; add --resume to continue the run in it, or choose another")
            old, new = ({k: x for k, x in s.items() if k not in free} for s in (read_settings(path), settings))
            if found := "; ".join(differences(old, new)):
                raise RunError(
                    f"--resume: the run in {path} has other settings ({found}); leave them out to continue it"
                )
        # The system lets go of the lock however the process ends.
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        files.callback(os.close, descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileError(f"{path / _LOCK} is not a regular file")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RunError(f"--out {path} is in use by another process; wait for it, or choose another") from None

    def _open(self, files: contextlib.ExitStack, config: dict[str, Any], keep: int, keep_period: int) -> int:
        path = self.path
        for directory in (path, path / "stages"):
            remove_litter(directory)
        config = {**config, "checksum": _checksum(config)}
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
        checkpoints = path / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        _check_checkpoints(checkpoints)
        try:
            with quiet():
                self._checkpoints = ocp.CheckpointManager(checkpoints.absolute(), options=options)
            files.callback(self._checkpoints.close)
            steps = sorted(self._checkpoints.all_steps())
            for step in steps[:-keep]:  # a process that was killed has not removed them all
                if step % keep_period:
                    self._checkpoints.delete(step)
            latest: int = max(steps, default=0)
        except Exception as error:  # orbax raises many kinds
            raise RunError(f"{checkpoints} cannot be used: {first_line(error)}") from None
        if not 0 <= latest <= MOST_META_STEPS:
            raise RunError(f"{checkpoints / str(latest)} is not the checkpoint of a meta-step; delete it")
        self._metrics = files.enter_context(contextlib.closing(metrics.Metrics(path, latest)))
        return latest

    def mark_complete(self, meta_step: int) -> None:
        """Say that the run has ended with this meta-step."""

        def write() -> None:
            with _writing(self.path / _COMPLETE):
                write_atomically(self.path / _COMPLETE, f"{meta_step}\n".encode())

        _in_first(write)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row: ``meta_step``, numbers, strings and lists of numbers; what is not finite becomes null."""
        if not is_first():
            return
        with _writing(self.path / metrics.FILE):
            self._metrics.log(row)

    def save(self, meta_step: int, state: PyTree) -> None:
        """Save a checkpoint: a pytree of arrays, which may be spread over the processes.

        Raises:
            RunError: it could not be written; earlier checkpoints are intact.
        """
        whole = multihost_utils.process_allgather(state, tiled=True)

        def write() -> None:
            try:
                _reserve(self.path, 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(whole)) + OVERHEAD)
                self._note_checksum(meta_step, None)  # of another of this name, should the process be killed below
                with quiet():
                    self._checkpoints.save(meta_step, args=ocp.args.StandardSave(whole), force=True)
                    self._checkpoints.wait_until_finished()
                self._note_checksum(meta_step, _checksum_of_files(self.path / "checkpoints" / str(meta_step)))
            except Exception as error:  # orbax and tensorstore raise many kinds, a full disk among them
                raise RunError(
                    f"cannot save the checkpoint of meta-step {meta_step} in {self.path}: {_said(error)}; earlier "
                    "checkpoints are intact, continue with --resume"
                ) from None

        _in_first(write)
        self.latest = meta_step

    def _checksums(self) -> dict[str, Any]:
        """Those of the checkpoints by their names; earlier versions noted none."""
        file = self.path / _CHECKSUMS
        try:
            return read_json(file) if os.path.lexists(file) else {}
        except FileError as error:
            raise RunError(f"{error}; delete it to continue without") from None

    def _note_checksum(self, meta_step: int, checksum: str | None) -> None:
        """Note that of a checkpoint, or that there is none, and forget those of checkpoints that are gone."""
        before, place = self._checksums(), self.path / "checkpoints"
        there = {name: x for name, x in before.items() if name != str(meta_step) and (place / name).is_dir()}
        there |= {} if checksum is None else {str(meta_step): checksum}
        if there != before:
            write_atomically(self.path / _CHECKSUMS, json.dumps(there, indent=1).encode())

    def restore(self, like: PyTree) -> PyTree:
        """Read the latest checkpoint.

        Args:
            like: a state of the same shapes, spread over devices as the one that is returned.

        Raises:
            RunError: it cannot be read, or was written for another state.
        """
        here = SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)

        def read() -> PyTree:
            place = self.path / "checkpoints" / str(self.latest)
            try:
                found = _checksum_of_files(place)
            except OSError as error:
                raise RunError(f"{place} cannot be read: {first_line(error)}") from None
            if self._checksums().get(place.name, found) != found:
                raise RunError(f"{place} is damaged; delete it to continue from the one before")
            try:
                with quiet():
                    return self._checkpoints.restore(self.latest, args=ocp.args.StandardRestore(abstract))
            except Exception as error:  # as many kinds as in save
                raise RunError(
                    f"cannot read the checkpoint of meta-step {self.latest} in {self.path}: {_said(error)}; delete "
                    f"{place} to continue from the one before"
                ) from None

        def spread(x: jax.Array, mine: Any) -> jax.Array:
            whole = from_first(np.asarray(mine))
            return jax.make_array_from_callback(x.shape, x.sharding, lambda index: whole[index])

        found = _in_first(read)
        mine = found if is_first() else jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        return jax.tree.map(spread, like, mine)

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close; where something has gone wrong before, closing does not say what else did."""
        try:
            self.close()
        except RunError:
            if error is None:
                raise

    def close(self) -> None:
        """Close all files and let go of the directory.

        Raises:
            RunError: what was to be written last cannot be written; the directory is let go of.
        """
        try:
            self._files.close()
        except Exception as error:  # the disk is full, to which orbax has its own words
            raise RunError(
                f"cannot close the run in {self.path}: {first_line(error)}; checkpoints are intact"
            ) from None


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror}; checkpoints are intact") from None


def _said(error: Exception) -> str:
    """What orbax says, without its settings."""
    return first_line(error).partition(" [tensorstore_spec")[0]


def _reserve(directory: Path, size: int) -> None:
    """Raise an OSError if the disk is too full for so many bytes.

    Orbax would find it out in several threads, which say so in a hundred lines.
    """
    if hasattr(os, "posix_fallocate"):
        # Where the system cannot make a file without a name, a kill leaves this one, as litter.
        with tempfile.TemporaryFile(dir=directory, prefix=".reserved.new-") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):  # others: it cannot be known
                    raise


def _in_first(action: Callable[[], Any]) -> Any:
    """Do it in the first process; where it fails there, fail in all."""
    result, error = None, None
    if is_first():
        try:
            result = action()
        except RunError as failure:
            error = failure
    if multihost_utils.process_allgather(np.uint32(error is not None)).any():
        raise error or RunError("process 0 could not go on; its own message says why")
    return result


def holds_run(path: Path) -> bool:
    """Whether a directory has anything in it beside the lock and what killed processes have left.

    Raises:
        OSError: it cannot be read.
    """
    return os.path.isdir(path) and any(x.name != _LOCK and not is_litter(x.name) for x in path.iterdir())


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of the run in a directory.

    Raises:
        RunError: in one line that names the file, there are none, or not those that were written.
    """
    file = path / _CONFIG
    try:
        config = read_json(file)
    except FileError as error:
        raise RunError(f"--out {path} is not the directory of a run: {error}; choose another") from None
    settings, checksum = config.get("settings"), config.pop("checksum", None)
    if not isinstance(settings, dict) or config.keys() - {"settings", "versions"}:
        raise RunError(f"--out {path} is not the directory of a run: {file} does not hold the settings of one")
    if checksum not in (None, _checksum(config)):  # runs of earlier versions have none
        raise RunError(f"{file} is damaged: it is not what was written; a run's settings stay as they are")
    return settings


def _checksum(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _checksum_of_files(directory: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        found.update(os.fsencode(f"{file.relative_to(directory)} {file.stat().st_size} "))
        with file.open("rb") as stream:
            for part in iter(lambda: stream.read(2**20), b""):
                found.update(part)
    return found.hexdigest()


def _read_complete(file: Path) -> int:
    """The meta-step that a run has ended with; 0 where it has not, or the file does not say so."""
    if not os.path.lexists(file):
        return 0
    text = read_regular(file, most=100).decode("ascii", "replace").strip()
    if not text.isdecimal() or not 0 < int(text) <= MOST_META_STEPS:
        print(f"{file} does not count: it does not hold the number of a meta-step", file=sys.stderr)
        return 0
    return int(text)


def _check_checkpoints(directory: Path) -> None:
    """Raise a FileError unless there are only files and directories in it: reading a pipe would not end."""
    for entry in directory.iterdir():
        if entry.name.isdecimal() and not entry.is_dir():
            raise FileError(f"{entry} is not a directory, as a checkpoint is; delete it to continue")
    for place, folders, files in os.walk(directory):
        for entry in (Path(place) / name for name in (*folders, *files)):
            if not stat.S_ISREG(entry.lstat().st_mode) and not stat.S_ISDIR(entry.lstat().st_mode):
                raise FileError(f"{entry} is not a regular file")


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
