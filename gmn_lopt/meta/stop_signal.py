"""Ending a run early, between two meta-steps, when a signal asks for it."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Whether SIGINT or SIGTERM has asked to stop. A second SIGINT ends the process in the usual way."""

    def __init__(self) -> None:
        self.requested = False
        self._passed_on = False

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Listen while the context lasts (in the main thread; Python allows it nowhere else)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: Any) -> None:
            self.requested = True
            signal.signal(number, before[signal.Signals(number)])

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def at(self, meta_step: int) -> bool:
        """Whether to stop after this meta-step. Of several processes all stop at the same, whichever was asked.

        Every process must ask after every meta-step, since JAX chooses the one that they stop at from these calls.
        """
        if jax.process_count() == 1:
            return self.requested
        # JAX's preemption service has taken over SIGTERM, and tells the other processes of it.
        if self.requested and not self._passed_on:
            self._passed_on = True
            os.kill(os.getpid(), signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(meta_step)
