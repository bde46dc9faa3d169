"""Errors in one line: those of the commands, and those of others."""

LONGEST = 1000  # characters


class OneLine(Exception):
    """An error whose message is one line that a terminal can show, whatever names and values it quotes."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class UsageError(OneLine, ValueError):
    """A command asks for something that cannot be done."""


class FileError(OneLine, ValueError):
    """A file is not there, or not what it should be. The message names it."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, or its type; of the system's errors their words and the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def reason_of(error: BaseException) -> str:
    """Of the system's errors their words, without the file; of others their first line."""
    return getattr(error, "strerror", None) or first_line(error)


def printable(text: str) -> str:
    r"""Text on one line for a terminal: control characters are written out, and what is very long is cut.

    Example:
        >>> printable("a\nb\x1b[31m")
        'a\\nb\\x1b[31m'
    """
    shown = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text)
    if len(shown) <= LONGEST:
        return shown
    return f"{shown[: LONGEST // 2]} ... {shown[-LONGEST // 2 :]}"  # the end says what can be done
