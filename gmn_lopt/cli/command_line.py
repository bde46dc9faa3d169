"""Command lines from frozen dataclasses, with errors in one line."""

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

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
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            given: dict[str, Any] = {} if default is None else {"default": default}
            # Parts of an optimizer are chosen by --optimizer; flags change fields of the parts that it has.
            markers = (tyro.conf.AvoidSubcommands,)
            return tyro.cli(config, description=description, args=args, config=markers, **given)
    except SystemExit as exit_:
        if exit_.code:
            # tyro frames its message: the lines up to the first rule are what is wrong, the rest repeats the help.
            lines = [line.strip(" │") for line in printed.getvalue().splitlines()[1:]]
            wrong = lines[: next((i for i, line in enumerate(lines) if line[:1] in "─╰"), len(lines))]
            print(f"{' '.join(wrong) or 'arguments not understood'} (--help lists all flags)", file=sys.stderr)
        raise
