"""Command lines from frozen dataclasses, with errors in one line."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import tyro

from gmn_lopt.util.errors import UsageError, first_line, printable
from gmn_lopt.util.signals import on_arrival

LONGEST_ARGUMENT, LONGEST_FLAG = 4096, 100  # characters
Config = TypeVar("Config")


def parse(
    config: type[Config], description: str | None, args: Sequence[str] | None = None, default: Config | None = None
) -> Config:
    """Parse the command line into a dataclass whose fields are the flags.

    Args:
        config: the dataclass; the attributes' documentation is the flags' help.
        description: the program's own documentation.
        args: the arguments; default: those of the process.
        default: where flags that are not given take their values from; default: the fields' own defaults.

    Returns:
        An instance of ``config``.

    Raises:
        SystemExit: after ``--help``, or, with code 2 and one line on stderr, where the arguments are not understood.
    """
    if problem := _problem(sys.argv[1:] if args is None else args):
        print(printable(problem), file=sys.stderr)
        raise SystemExit(2)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            given: dict[str, Any] = {} if default is None else {"default": default}
            # Parts of an optimizer are chosen by --optimizer; flags change fields of the parts that it has.
            markers = (tyro.conf.AvoidSubcommands,)
            return tyro.cli(config, description=description, args=args, config=markers, **given)
    except SystemExit as exit_:
        if exit_.code:
            print(printable(f"{_message(printed.getvalue())} (--help lists all flags)"), file=sys.stderr)
        raise


def _message(framed: str) -> str:
    """What is wrong, of what tyro prints: a title, that, and after a rule the help again.

    The frame and the rules are of other characters where the terminal has ASCII only.
    """
    lines = [line.strip(" \t│|") for line in framed.splitlines()[1:]]
    rules = [i for i, line in enumerate(lines) if len(line) >= 10 and not line.strip("─-╭╮╰╯")]
    begin = 1 if rules[:1] == [0] else 0
    end = next((i for i in rules if i >= begin), len(lines))
    return " ".join(" ".join(lines[begin:end]).split()) or "arguments not understood"


def _problem(args: Sequence[str]) -> str | None:
    """What is wrong with arguments that no flag takes; looking for flags with similar names would not end."""
    for arg in args:
        flag = arg.partition("=")[0]
        if len(arg) > LONGEST_ARGUMENT:
            return f"an argument has {len(arg)} characters, more than {LONGEST_ARGUMENT}: {arg[:40]}..."
        if arg.startswith("-") and (len(flag) > LONGEST_FLAG or not flag.isprintable()):
            return f"{arg[:40]} is not a flag (--help lists all flags)"
    return None


@contextlib.contextmanager
def interrupted_with(message: str) -> Iterator[None]:
    """Let Ctrl-C end the process with this line on stderr and exit code 130.

    At once, also while JAX compiles, since all files are written atomically: a KeyboardInterrupt would show as a
    traceback where it is raised in one of JAX's callbacks.
    """

    def end(number: int) -> None:
        line = f"{printable(message)}\n".encode(sys.stderr.encoding, "backslashreplace")
        os.write(2, line)  # print may have been interrupted itself
        os._exit(130)

    # Python listens in no other thread.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, _: None)
    try:
        with on_arrival({signal.SIGINT}, end):
            yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def one_line_for_the_machine() -> Iterator[None]:
    """Make a :class:`UsageError` of what the machine has too little of: memory, or a disk that takes a file."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UsageError(f"not enough memory: {first_line(error)}; take smaller sizes") from None
    except OSError as error:
        raise UsageError(first_line(error)) from None
