"""Silence of threads that log and print what is raised as well."""

import contextlib
import io
import logging
import time
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let nothing be logged, nor printed to stderr by Python, within the context.

    Orbax logs and prints what fails in its threads with a traceback of each, and raises it, too.

    Example:
        >>> import logging
        >>> with quiet():
        ...     logging.error("nobody hears this")
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                yield
            except Exception:
                time.sleep(0.3)  # in which threads that had not ended yet say so
                raise
    finally:
        logging.disable(before)
