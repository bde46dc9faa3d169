"""The metrics of a meta-training run: a line of JSON for each row, and the same for TensorBoard."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from gmn_lopt.util.errors import first_line, printable
from gmn_lopt.util.files import parse_json, read_regular, write_atomically

FILE, EVENTS = "metrics.jsonl", "events"
LARGEST = 2**30  # bytes


class Metrics:
    """``metrics.jsonl`` and ``events/`` in the directory of a run, opened to go on after a meta-step.

    What is written is written at once, in this thread: where the disk is full the caller hears of it.

    Args:
        directory: of the run.
        latest: the meta-step from which the run goes on; rows after it go.

    Raises:
        OSError, FileError: one of them cannot be read or written.
    """

    def __init__(self, directory: Path, latest: int):
        file = directory / FILE
        kept = good_lines(file, latest)
        write_atomically(file, b"".join(line + b"\n" for line in kept))
        (directory / EVENTS).mkdir(exist_ok=True)
        self._events = EventsWriter(str((directory / EVENTS / "events").absolute()))
        # TensorBoard drops what an earlier process wrote for this meta-step and later.
        self._event(latest + 1, session_log=SessionLog(status=SessionLog.START))
        self._lines = file.open("a", encoding="utf-8")

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row: ``meta_step``, numbers, strings and lists of numbers; what is not finite becomes null.

        Raises:
            OSError: it cannot be written.
        """
        print(json.dumps(_finite(row)), file=self._lines, flush=True)
        for name, value in row.items():
            for key, number in _scalars(name, value).items():
                if name != "meta_step" and math.isfinite(number):
                    self._event(row["meta_step"], summary=scalar(key, number))
        self._events.flush()

    def close(self) -> None:
        """Close both, the second also where the first fails."""
        try:
            self._lines.close()
        finally:
            self._events.close()

    def _event(self, meta_step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=meta_step, **content))


def good_lines(file: Path, latest: int) -> list[bytes]:
    """The lines up to a meta-step; lines that are no rows are left out, which stderr is told.

    The last line, where it has no end, is one during which the process was killed: it goes without a word. A file that
    is not there has no lines.

    Raises:
        FileError: it cannot be read.
    """
    kept, bad, before = [], [], 0
    *lines, _ = read_regular(file, LARGEST).split(b"\n") if os.path.lexists(file) else [b""]
    for number, line in enumerate(lines, 1):
        try:
            meta_step = _meta_step(line, before)
        except ValueError as error:
            bad.append(f"line {number}: {first_line(error)}")
            continue
        before = meta_step
        if meta_step <= latest:
            kept.append(line)
    if bad:
        count = "a line" if len(bad) == 1 else f"{len(bad)} lines"
        print(printable(f"{file}: left out {count} that cannot be read ({bad[0]})"), file=sys.stderr)
    return kept


def read_rows(directory: Path, latest: int) -> list[dict[str, Any]]:
    """The rows of a run up to a meta-step.

    Raises:
        FileError: they cannot be read.

    Example:
        >>> read_rows(Path("nowhere"), 10)
        []
    """
    return [json.loads(line) for line in good_lines(directory / FILE, latest)]


def _meta_step(line: bytes, before: int) -> int:
    """That of a row; a ValueError says what is wrong with the row."""
    row = parse_json(line)
    meta_step = row.get("meta_step") if isinstance(row, dict) else None
    if type(meta_step) is not int:
        raise ValueError("it is not an object with a meta_step")
    if not before < meta_step < 2**31:
        raise ValueError("its meta_step does not come after the one before")
    return meta_step


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(name: str, value: Any) -> dict[str, float | int]:
    """The numbers of a metric, each with a name."""
    if isinstance(value, list):
        width = len(str(len(value)))
        return {f"{name}/{i:0{width}d}": number for i, number in enumerate(value) if number is not None}
    return {name: value} if isinstance(value, int | float) else {}
