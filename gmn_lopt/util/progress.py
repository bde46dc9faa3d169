"""Progress on stderr: a bar on a terminal, now and then a line where the output is a file."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS = 10.0  # between two lines in a file


class Progress:
    """Counts up to a total, as a context manager.

    Args:
        total: of what is counted.
        done: what of it is done already.
        show: whether to show anything.
    """

    def __init__(self, total: int, done: int = 0, show: bool = True):
        self._total, self._done = total, done
        self._bar = tqdm(total=total, initial=done, dynamic_ncols=True) if show and sys.stderr.isatty() else None
        self._lines = show and self._bar is None
        self._text = self._note = self._shown = ""
        self._next = time.monotonic() + SECONDS

    def describe(self, text: str) -> None:
        """Say what is being done; it stands in front of the count."""
        self._text = text
        if self._bar is not None:
            self._bar.set_description(text)

    def note(self, text: str) -> None:
        """Say how it goes; it stands behind the count."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def update(self, count: int = 1) -> None:
        """Count up."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() >= self._next:
            self._line()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done:
            self._line()

    def _line(self) -> None:
        text = f"{self._text}: {self._done}/{self._total}" if self._text else f"{self._done}/{self._total}"
        text += f", {self._note}" if self._note else ""
        if self._lines and text != self._shown:
            print(text, file=sys.stderr, flush=True)
        self._shown, self._next = text, time.monotonic() + SECONDS
