"""Threads: JAX's factorisations on a processor are those of SciPy's BLAS, which has a pool of threads of its own."""

import contextlib
import os
from collections.abc import Iterator

import scipy.linalg  # noqa: F401  (loads the BLAS that JAX's factorisations call, so that it can be limited)
from threadpoolctl import threadpool_limits


def one_blas_thread() -> None:
    """Let BLAS have one thread from here on, unless the user's ``OPENBLAS_NUM_THREADS`` says otherwise.

    Its threads wait for each other without giving up their cores. XLA runs the factorisations of small matrices, which
    ``denoised`` takes at each step, in parallel already; with other work on the machine, training took eight to
    eighteen times longer with two threads of BLAS than with one.
    """
    if not os.environ.get("OPENBLAS_NUM_THREADS"):
        threadpool_limits(1, user_api="blas")


@contextlib.contextmanager
def one_core() -> Iterator[bool]:
    """Keep all threads of this process on one core, and BLAS to one thread: times do not depend on their number then.

    Programs that are compiled within it are not split for several threads either.

    Yields:
        Whether that is so: it cannot be done where the system has no ``os.sched_setaffinity``, as macOS.
    """
    with threadpool_limits(1, user_api="blas"):
        if not hasattr(os, "sched_setaffinity") or not os.path.isdir("/proc/self/task"):
            yield False
            return
        allowed = os.sched_getaffinity(0)
        before = {thread: os.sched_getaffinity(thread) for thread in _threads()}
        cores = sorted(allowed)
        _keep({thread: {cores[os.getpid() % len(cores)]} for thread in before})  # processes choose different ones
        try:
            yield True
        finally:
            _keep({thread: before.get(thread, allowed) for thread in _threads()})


def _threads() -> list[int]:
    return [int(thread) for thread in os.listdir("/proc/self/task")]


def _keep(cores: dict[int, set[int]]) -> None:
    for thread, own in cores.items():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread, own)
