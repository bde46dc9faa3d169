"""Progress on stderr: a bar on a terminal, a plain line now and then in a file."""

import sys
from typing import Any

from tqdm import tqdm

SECONDS = 30.0  # between lines in a file


class _Lines(tqdm):
    """A bar whose states are lines of their own."""

    @staticmethod
    def status_printer(file: Any) -> Any:
        return lambda status: print(status, file=file, flush=True)

    def close(self) -> None:
        if not getattr(self, "disable", True):
            self.refresh()
            self.disable = True
            self._decr_instances(self)


def progress(
    total: int,
    desc: str,
    unit: str,
    *,
    initial: int = 0,
    scale: bool = False,
    disable: bool = False,
    file: Any = None,
) -> tqdm:
    """Count the parts of a long computation for the user to see.

    Args:
        total: how many there are.
        desc: what they belong to, in front of the count.
        unit: what one is, such as ``"steps"``.
        initial: how many were done before.
        scale: whether to write large counts as 12.3k and the like.
        disable: whether to show nothing.
        file: where to write; default: stderr.

    Returns:
        A context manager with ``update(n=1)``, ``set_description`` and ``set_postfix`` of ``tqdm``; it writes a line to
        a file at the first, at most every 30 seconds, for a new description, and at the end.

    Example:
        >>> with progress(2, "squares", "numbers", file=sys.stdout) as bar:
        ...     for number in range(2):
        ...         bar.update()
        squares: 0/2 numbers ...
        squares: 2/2 numbers ...
    """
    file = sys.stderr if file is None else file
    terminal = file.isatty()
    settings: dict[str, Any] = {"dynamic_ncols": True, "mininterval": 0.2}
    if not terminal:
        line = "{desc}{n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        settings = {"bar_format": line, "mininterval": SECONDS, "maxinterval": SECONDS}
    return (tqdm if terminal else _Lines)(
        total=total,
        desc=f"{desc}: ",
        unit=f" {unit}",
        initial=initial,
        unit_scale=scale,
        disable=disable,
        file=file,
        **settings,
    )
