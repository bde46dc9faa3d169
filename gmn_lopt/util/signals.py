"""Signals as they arrive."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator


@contextlib.contextmanager
def on_arrival(numbers: Collection[int], function: Callable[[int], None]) -> Iterator[None]:
    """Call a function, in another thread, with the number of each of these signals that arrives within the context.

    Python calls the handlers of signals between two instructions of the main thread, of which one may compile for a
    minute; this does not wait for that. Only signals that have a handler in Python are seen. In another thread than the
    main one this does nothing.

    Example:
        >>> import signal, threading
        >>> before, arrived = signal.signal(signal.SIGINT, lambda *_: None), threading.Event()
        >>> with on_arrival({signal.SIGINT}, lambda number: arrived.set()):
        ...     signal.raise_signal(signal.SIGINT)
        ...     arrived.wait(10)
        True
        >>> _ = signal.signal(signal.SIGINT, before)
    """
    if threading.current_thread() is not threading.main_thread() or not numbers:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        with os.fdopen(reader, "rb", buffering=0) as arrived:
            while number := arrived.read(1):
                if number[0] in numbers:
                    function(number[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    other = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(other)
        os.close(writer)
        thread.join()
