"""Errors in one line: those of the commands, and those of others."""


class UsageError(ValueError):
    """A command asks for something that cannot be done. The message is one line."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
