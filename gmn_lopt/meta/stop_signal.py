"""Ending a run early, between two meta-steps, when a signal asks for it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class StopSignal:
    """Whether SIGINT or SIGTERM has asked to stop. The second signal ends the process in the usual way."""

    def __init__(self) -> None:
        self.requested = False

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
