"""Several processes that compute one run together; with one process nothing here does anything."""

import atexit
import contextlib
import hashlib
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from gmn_lopt.util.errors import UsageError, first_line
from gmn_lopt.util.signals import on_arrival

COORDINATION_SECONDS = 300  # in which all processes must have come
HEARTBEAT_SECONDS = 60  # a process that has been silent for so long is lost
LOST = 3  # exit code of a process that ends because another was lost
PATIENCE = 0.5  # seconds in which a second signal may end the process in the usual way
LAST_WORDS = "{}: another process was lost; start all of them again with --resume"

# What the errors of collectives say when it is the other side that is missing.
_MISSING = re.compile(r"gloo|nccl|coordination|heartbeat|connection (closed|reset|refused)|deadline|unavailable", re.I)


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def from_first(array: np.ndarray) -> np.ndarray:
    """The array that the first process holds, bit for bit; those of the others have its shape and type."""
    # As bytes: the sum of floating-point numbers that a broadcast is would lose the sign of zero.
    data = multihost_utils.broadcast_one_to_all(np.frombuffer(np.asarray(array).tobytes(), np.uint8))
    return np.frombuffer(np.asarray(data).tobytes(), array.dtype).reshape(array.shape)


def check_same(text: str) -> None:
    """Raise a :class:`UsageError` in all processes unless they have been given the same."""
    try:
        multihost_utils.assert_equal(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8))
    except AssertionError:
        raise UsageError(
            "the processes have different settings; give all of them the same command line, but for --process-id, "
            "and the same --out on a file system that they share"
        ) from None


@contextlib.contextmanager
def connected(coordinator: str | None, count: int | None, index: int | None) -> Iterator[None]:
    """Connect this process to the others of the run, as long as the context lasts.

    When another process is lost, this one ends: with a line on stderr and exit code :data:`LOST` where the loss shows
    in the computation; where it does not, JAX aborts it in its own words, after :data:`HEARTBEAT_SECONDS` at the
    latest.

    Args:
        coordinator: ``HOST:PORT`` of the process with index 0, ``"auto"`` to ask the cluster's environment (SLURM, Open
            MPI, TPU pods, ...), or None for one process (or for those that are connected already).
        count: number of processes; not needed for ``"auto"``.
        index: of this process; not needed for ``"auto"``.

    Raises:
        UsageError: in one line, what is missing, or why the processes cannot be connected.
    """
    if coordinator is None:
        if count is not None or index is not None:
            raise UsageError("--processes and --process-id need --coordinator HOST:PORT, that of process 0")
        yield
        return
    auto = coordinator == "auto"
    host, _, port = coordinator.rpartition(":")
    if not auto and (not host or not port.isdecimal()):
        raise UsageError(f"--coordinator is {coordinator!r}; write HOST:PORT, that of process 0, or auto")
    if not auto and (count is None or index is None):
        raise UsageError("--coordinator HOST:PORT needs --processes and --process-id")
    if count is not None and index is not None and not 0 <= index < count:
        raise UsageError(f"--process-id is {index}; with --processes {count} it must be from 0 to {count - 1}")
    try:
        jax.distributed.initialize(
            None if auto else coordinator,
            count,
            index,
            initialization_timeout=COORDINATION_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError, OSError) as error:
        hint = "; no cluster was recognised, give HOST:PORT" if auto and isinstance(error, ValueError) else ""
        raise UsageError(f"--coordinator {coordinator}: {first_line(error)}{hint}") from None
    try:
        devices = Counter(device.process_index for device in jax.devices())
        if len(set(devices.values())) > 1:
            raise UsageError(f"every process needs as many devices; they have {', '.join(map(str, devices.values()))}")
        yield
    except BaseException as error:
        # Collectives raise these two, but none of their subclasses.
        if type(error) in (jax.errors.JaxRuntimeError, ValueError) and _MISSING.search(str(error)):
            print(LAST_WORDS.format(Path(sys.argv[0]).name), file=sys.stderr, flush=True)
            os._exit(LOST)
        # The usual end of the program would wait for the others, which wait for this one.
        atexit.register(_exit)
        raise
    jax.distributed.shutdown()


def _exit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(1)  # where all fail for the same reason, each can say so before it is aborted for the loss of this one
    os._exit(2)


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Let SIGINT and SIGTERM end the run early, as long as the context lasts; a second one of either acts as before.

    Where Python cannot act, because it is compiling, a second one that would end the process does so with exit code
    128 and its number.

    Yields:
        Whether to stop after this meta-step. Of several processes all stop at the same, whichever was asked; each must
        ask after every meta-step, since JAX chooses the one that they stop at from these calls.
    """
    in_main = threading.current_thread() is threading.main_thread()  # Python listens nowhere else
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if in_main}
    # None is a handler that is not Python's, and is left alone.
    before = {int(number): handler for number, handler in usual.items() if handler is not None}
    requests: list[int] = []
    counts = Counter[int]()

    def request(number: int, frame: FrameType | None) -> None:
        requests.append(number)
        counts[number] += 1
        # Among several processes SIGTERM is JAX's, see below.
        if (counts[number] if jax.distributed.is_initialized() else counts.total()) == 1:
            return
        handler = before[number]
        if callable(handler):
            handler(number, frame)
        elif handler != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def stop(meta_step: int) -> bool:
        if jax.process_count() == 1:
            return bool(requests)
        # JAX's preemption service has taken over SIGTERM, and tells the other processes of it.
        if requests:
            requests.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(meta_step)

    def end(number: int) -> None:
        requested[number] += 1
        if requested.total() > 1 and before[number] == signal.SIG_DFL and not jax.distributed.is_initialized():
            time.sleep(PATIENCE)
            os._exit(128 + number)

    requested = Counter[int]()
    try:
        for number in before:
            signal.signal(number, request)
        with on_arrival(before, end):
            yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
