"""The directory of one meta-training run: settings, metrics, checkpoints, and the current optimizer."""

import contextlib
import fcntl
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree
from tensorboardX import SummaryWriter

from gmn_lopt.meta.processes import from_first, is_first
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
        complete: whether the run has ended.

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
                except OSError as error:
                    reason = error.strerror or error
                    raise RunError(f"--out {path}: {reason}; choose a directory that can be written") from None
                self._files = files.pop_all()  # all went well: the lock is held until the run is closed
            return np.array([latest, (path / _COMPLETE).exists()], np.uint32)

        found = _in_first(open_)
        latest, complete = from_first(np.zeros(2, np.uint32) if found is None else found)
        self.latest, self.complete = int(latest), bool(complete)

    def _claim(
        self, files: contextlib.ExitStack, settings: Mapping[str, Any], resume: bool, free: Collection[str]
    ) -> None:
        path = self.path
        path.mkdir(parents=True, exist_ok=True)
        if {entry.name for entry in path.iterdir() if entry.suffix != ".partial"} - {_LOCK}:
            if not resume:
                raise RunError(f"--out {path} is not empty; add --resume to continue the run in it, or choose another")
            old, new = ({k: x for k, x in s.items() if k not in free} for s in (read_settings(path), settings))
            if found := "; ".join(differences(old, new)):
                raise RunError(
                    f"--resume: the run in {path} has other settings ({found}); leave them out to continue it"
                )
        # The system lets go of the lock however the process ends.
        lock = files.enter_context((path / _LOCK).open("a"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RunError(f"--out {path} is in use by another process; wait for it, or choose another") from None

    def _open(self, files: contextlib.ExitStack, config: dict[str, Any], keep: int, keep_period: int) -> int:
        path = self.path
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
        files.callback(self._checkpoints.close)
        latest: int = self._checkpoints.latest_step() or 0
        # The lines that were written after the latest checkpoint go, and the one during which the process was killed.
        kept = []
        for line in (path / _METRICS).read_text().splitlines() if (path / _METRICS).exists() else []:
            with contextlib.suppress(ValueError):
                if json.loads(line)["meta_step"] <= latest:
                    kept.append(line + "\n")
        write_atomically(path / _METRICS, "".join(kept).encode())
        self._metrics = files.enter_context((path / _METRICS).open("a"))
        self._events = files.enter_context(SummaryWriter(str(path / "events"), purge_step=latest + 1))
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
        with _writing(self.path / _METRICS):
            print(json.dumps(_finite(row)), file=self._metrics, flush=True)
        for name, value in row.items():
            for key, number in _scalars(name, value).items():
                if name != "meta_step" and math.isfinite(number):
                    self._events.add_scalar(key, number, row["meta_step"])

    def save(self, meta_step: int, state: PyTree) -> None:
        """Save a checkpoint: a pytree of arrays, which may be spread over the processes.

        Raises:
            RunError: it could not be written; earlier checkpoints are intact.
        """
        whole = multihost_utils.process_allgather(state, tiled=True)

        def write() -> None:
            try:
                self._checkpoints.save(meta_step, args=ocp.args.StandardSave(whole), force=True)
                self._checkpoints.wait_until_finished()
            except Exception as error:  # orbax and tensorstore raise many kinds, a full disk among them
                raise RunError(
                    f"cannot save the checkpoint of meta-step {meta_step} in {self.path}: {first_line(error)}; earlier "
                    "checkpoints are intact, continue with --resume"
                ) from None

        _in_first(write)
        self.latest = meta_step

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
            try:
                return self._checkpoints.restore(self.latest, args=ocp.args.StandardRestore(abstract))
            except Exception as error:  # as many kinds as in save
                raise RunError(
                    f"cannot read the checkpoint of meta-step {self.latest} in {self.path}: {first_line(error)}; "
                    f"delete {self.path / 'checkpoints' / str(self.latest)} to continue from the one before"
                ) from None

        def spread(x: jax.Array, mine: Any) -> jax.Array:
            whole = from_first(np.asarray(mine))
            return jax.make_array_from_callback(x.shape, x.sharding, lambda index: whole[index])

        found = _in_first(read)
        mine = found if is_first() else jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        return jax.tree.map(spread, like, mine)

    def close(self) -> None:
        """Close all files and let go of the directory."""
        self._files.close()


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror}; checkpoints are intact") from None


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
