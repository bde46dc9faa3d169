"""What a process says when JAX aborts it.

When another process of a run is lost, or never comes, the runtime of JAX aborts the process from a C++ thread: no
exception is raised, and the stack trace of that thread is written to stderr. Here stderr is read by a small program of
its own (this file, run as a script: it imports nothing but the standard library), which passes on everything else and
puts one line, set beforehand, in place of that.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn

_WORDS, _NOW = b"\0words ", b"\0now"
# The coordination service of JAX logs that a process is lost, and then ends this one.
_PRELUDE = re.compile(rb"^E\d{4} .*coordination_service")
_FATAL = re.compile(rb"^F\d{4} .*(distributed service|coordination)")


class LastWords:
    """Take over stderr, until :meth:`close`.

    Python goes on writing to the terminal; only what is written to file descriptor 2 itself passes the filter.
    """

    def __init__(self) -> None:
        sys.stderr.flush()
        self._python = sys.stderr
        self._original = os.dup(2)
        reader, writer = os.pipe()
        # A session of its own, for Ctrl-C is meant for the run only.
        command = [sys.executable, "-I", __file__]
        self._filter = subprocess.Popen(command, stdin=reader, stdout=subprocess.DEVNULL, start_new_session=True)
        os.close(reader)
        os.dup2(writer, 2)
        os.close(writer)
        sys.stderr = os.fdopen(os.dup(self._original), "w", buffering=1)

    def set(self, words: str) -> None:
        """Set the line that is written if JAX aborts the process from now on."""
        self._send(_WORDS + words.replace("\n", " ").encode() + b"\n")

    def say(self, code: int) -> NoReturn:
        """Write the line and end the process with an exit code, at once: nothing that waits for others is run."""
        self._send(_NOW + b"\n")
        sys.stdout.flush()
        os._exit(code)

    def close(self) -> None:
        """Give stderr back; nothing is said any more."""
        os.dup2(self._original, 2)
        os.close(self._original)
        sys.stderr.close()
        sys.stderr = self._python
        self._filter.wait(timeout=10)

    def _send(self, line: bytes) -> None:
        with contextlib.suppress(OSError):  # without the filter the run goes on, and ends with JAX's own words
            os.write(2, line)  # short enough to arrive in one piece


def relay(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Pass lines on, but for those of the abort and the ones that announce it.

    Args:
        lines: what the process writes to stderr, and the lines that :class:`LastWords` sends.
    """
    words, held, ending = b"", list[bytes](), False
    for line in lines:
        if line.startswith(_WORDS):
            words = line.removeprefix(_WORDS)
        elif line.startswith(_NOW):
            ending = True
        elif _FATAL.match(line):
            ending = True
            yield b"\n"  # Python may have been within a line, that of a progress bar
        elif held or _PRELUDE.match(line):
            held.append(line)
        elif not ending:
            yield line
    yield from held if not ending else [words] if words.strip() else []


if __name__ == "__main__":
    for passed in relay(sys.stdin.buffer):
        sys.stderr.buffer.write(passed)
        sys.stderr.buffer.flush()
