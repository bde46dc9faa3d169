"""Several processes that compute one run together."""

import atexit
import contextlib
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from gmn_lopt.meta.last_words import LastWords
from gmn_lopt.util.errors import first_line

COORDINATION_SECONDS = 300  # in which all processes must have come
HEARTBEAT_SECONDS = 60  # a process that has been silent for so long is lost
LOST = 3  # exit code of a process that ends because another was lost
_LAG = 4  # calls of `agree` until a flag that was raised is seen by all

# What the errors of collectives say when it is the other side that is missing.
_MISSING = re.compile(r"gloo|nccl|coordination|heartbeat|connection (closed|reset|refused)|deadline|unavailable", re.I)


class ProcessesError(Exception):
    """The processes cannot work together as asked. The message is one line."""


class Processes:
    """The processes of this run, as one of them sees them; one process is no special case.

    All methods but :meth:`reached` must be called by all processes, in the same order.

    Args:
        words: what this process says if another is lost.
    """

    def __init__(self, words: LastWords | None = None):
        self.count = jax.process_count() if jax.distributed.is_initialized() else 1
        self.index = jax.process_index() if self.count > 1 else 0
        self._words = words
        self._raised: deque[Array] = deque()

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.index == 0

    def reached(self, meta_step: int) -> None:
        """Remember the meta-step, to be named if another process is lost."""
        if self._words:
            lost = f"process {1 - self.index}" if self.count == 2 else "another process"
            self._words.set(
                f"meta_train.py: {lost} was lost at meta-step {meta_step}; start all processes again with --resume"
            )

    def agree(self, flag: bool) -> bool:
        """Whether any process has raised its flag; the same answer everywhere.

        With several processes the answer comes a few calls late, so that the device never waits for the host.
        """
        if self.count == 1:
            return flag
        self._raised.append(self._total(np.uint32(flag)))
        return len(self._raised) > _LAG and bool(self._raised.popleft())

    def any(self, flag: bool) -> bool:
        """Whether any process has raised its flag, at once."""
        return flag if self.count == 1 else bool(self._total(np.uint32(flag)))

    def from_first(self, tree: PyTree) -> PyTree:
        """What the first process holds, bit for bit.

        Args:
            tree: NumPy arrays, of the same shapes and types in all processes.
        """
        return tree if self.count == 1 else jax.tree.map(self._from_first, tree)

    def gather(self, tree: PyTree) -> PyTree:
        """All of the arrays, which are spread over the processes, as NumPy arrays in the first one; elsewhere None."""
        # One leaf at a time: no device has to hold the whole state.
        return jax.tree.map(self._gather, tree)

    def check_same(self, text: str) -> None:
        """Check that all processes have been given the same.

        Raises:
            ProcessesError: in all of them, if there is a difference.
        """
        mine = np.frombuffer(text.encode().ljust(1 << 14)[: 1 << 14], np.uint8)
        if self.any(bool((self.from_first(mine) != mine).any())):
            raise ProcessesError(
                "the processes have different settings; give all of them the same command line, but for --process-id, "
                "and the same --out on a file system that they share"
            )

    def _from_first(self, array: np.ndarray) -> np.ndarray:
        array = np.asarray(array)
        # As bytes: a sum of floating-point numbers would lose the sign of zero.
        data = np.frombuffer(array.tobytes(), np.uint8)
        total = np.asarray(self._total(data if self.first else np.zeros_like(data)))
        return np.frombuffer(total.tobytes(), array.dtype).reshape(array.shape)

    def _gather(self, array: Array) -> np.ndarray | None:
        if not array.is_fully_replicated:
            mesh = array.sharding.mesh  # type: ignore[attr-defined]
            array = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(array)
        return np.asarray(array) if self.first else None

    def _total(self, array: np.ndarray | np.generic) -> Array:
        """The sum over all processes."""
        shape, dtype = (self.count, *array.shape), array.dtype
        rows = jax.make_array_from_callback(shape, self._split, lambda _: np.asarray(array)[None], dtype=dtype)
        return self._sum(rows)

    @cached_property
    def _split(self) -> NamedSharding:
        devices = {device.process_index: device for device in reversed(jax.devices())}
        mesh = Mesh(np.asarray([devices[i] for i in range(self.count)]), ("processes",))
        return NamedSharding(mesh, PartitionSpec("processes"))

    @cached_property
    def _sum(self) -> jax.stages.Wrapped:
        replicated = NamedSharding(self._split.mesh, PartitionSpec())
        return jax.jit(lambda rows: jnp.sum(rows, axis=0, dtype=rows.dtype), out_shardings=replicated)


@contextlib.contextmanager
def connected(coordinator: str | None, count: int | None, index: int | None) -> Iterator[Processes]:
    """Connect this process to the others of the run, as long as the context lasts.

    When another process is lost, this one ends: with a line on stderr and exit code :data:`LOST` where the loss shows
    in the computation, or aborted by JAX, with the same line, after :data:`HEARTBEAT_SECONDS` at the latest.

    Args:
        coordinator: ``HOST:PORT`` of the process with index 0, ``"auto"`` to ask the cluster's environment (SLURM, Open
            MPI, TPU pods, ...), or None for one process (or for those that are connected already).
        count: number of processes; not needed for ``"auto"``.
        index: of this process; not needed for ``"auto"``.

    Raises:
        ProcessesError: in one line, what is missing, or why the processes cannot be connected.
    """
    if coordinator is None:
        if count is not None or index is not None:
            raise ProcessesError("--processes and --process-id need --coordinator HOST:PORT, that of process 0")
        yield Processes()
        return
    auto = coordinator == "auto"
    if not auto:
        _check(coordinator, count, index)
    # It would take SIGTERM for itself; `agree` does the same for every signal.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    words = LastWords()
    words.set(
        f"meta_train.py: the processes did not all come to --coordinator {coordinator} within {COORDINATION_SECONDS} "
        "seconds; start each of them with the same --coordinator and --processes, and a --process-id of its own"
    )
    try:
        jax.distributed.initialize(
            None if auto else coordinator,
            count,
            index,
            initialization_timeout=COORDINATION_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError, OSError) as error:
        words.close()
        hint = "; no cluster was recognised, give HOST:PORT" if auto and isinstance(error, ValueError) else ""
        raise ProcessesError(f"--coordinator {coordinator}: {first_line(error)}{hint}") from None
    try:
        processes = Processes(words)
        processes.reached(0)
        yield processes
    except BaseException as error:
        # Collectives raise these two, but none of their subclasses.
        if type(error) in (jax.errors.JaxRuntimeError, ValueError) and _MISSING.search(str(error)):
            words.say(LOST)
        words.set("")
        # The usual end of the program would wait for the others, which wait for this one.
        atexit.register(_exit)
        raise
    jax.distributed.shutdown()
    words.close()


def _check(coordinator: str, count: int | None, index: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ProcessesError(f"--coordinator is {coordinator!r}; write HOST:PORT, that of process 0, or auto")
    if count is None or index is None:
        raise ProcessesError("--coordinator HOST:PORT needs --processes and --process-id")
    if not 0 <= index < count:
        raise ProcessesError(f"--process-id is {index}; with --processes {count} it must be from 0 to {count - 1}")


def _exit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(1)  # where all fail for the same reason, each can say so before it is aborted for the loss of this one
    os._exit(2)
