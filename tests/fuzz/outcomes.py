"""What came of reading something damaged: refused in one line, or as if nothing had happened; all else is a fault."""

import contextlib
import io
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .mutations import Case

HANG = 20.0  # seconds that a call may take on a machine that has other things to do
SLOW = 3.0  # seconds of processor time; something may be compiled for the first time
MEMORY = 200 * 2**20  # bytes more than ever before
ADDRESSES = 8 * 2**30  # bytes more than before, so that a fault does not take the machine along
REFUSED, IDENTICAL = "refused in one line", "no difference"
FINE = (REFUSED, IDENTICAL)


class Refusal(Exception):
    """A command ended with an error code; the message is what it wrote to stderr."""


class Hang(BaseException):
    """A call took too long."""


@dataclass(frozen=True)
class Outcome:
    """What happened, and the details."""

    kind: str
    details: str = ""

    @property
    def fine(self) -> bool:
        """Whether it is what should happen."""
        return self.kind in FINE


def outcome(call: Callable[[], Any], refusals: tuple[type[Exception], ...], expected: Any) -> Outcome:
    """Call, and say what came of it."""
    memory, start = _peak(), time.process_time()
    try:
        with _limited():
            found = call()
    except Hang:
        return Outcome("hangs", traceback.format_exc())
    except (Refusal, *refusals) as error:
        result = _refused(str(error))
    except BaseException as error:
        return Outcome("traceback", f"{type(error).__name__}: {traceback.format_exc()[-1500:]}")
    else:
        result = Outcome(IDENTICAL) if found == expected else Outcome("loads something else", f"{found}"[:1000])
    if time.process_time() - start > SLOW:
        return Outcome("slow", f"{time.process_time() - start:.1f} s of processor time, {result.details}")
    if _peak() - memory > MEMORY:
        return Outcome("memory", f"{(_peak() - memory) >> 20} MiB, {result.details}")
    return result


def damaged(case: Case, pristine: Path, place: Path, read: Callable[[Path], Any], refusals, expected: Any) -> Outcome:
    """Damage a copy of a directory and read it."""
    copy = place / "damaged"
    shutil.copytree(pristine, copy)
    try:
        case.apply(copy)
        with contextlib.chdir(place):
            found = outcome(lambda: read(copy), refusals, expected)
        return Outcome("executed what was planted") if (place / "planted").exists() else found
    finally:
        (place / "planted").unlink(missing_ok=True)
        shutil.rmtree(copy)


def faults(
    cases: Iterable[Case], pristine: Path, place: Path, read: Callable[[Path], Any], refusals, expected: Any
) -> str:
    """All that is not fine, for people to read; empty: nothing."""
    found = ((case, damaged(case, pristine, place, read, refusals, expected)) for case in cases)
    wrong = [f"{case.name}: {outcome.kind}: {outcome.details}" for case, outcome in found if not outcome.fine]
    return f"{len(wrong)} faults:\n" + "\n".join(wrong) if wrong else ""


def command(cli: Callable[[list[str]], int], args: list[str]) -> None:
    """Call a command's ``cli``; an exit code other than 0 is a :class:`Refusal` with the last line of stderr."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli(args)
        except SystemExit as exit_:
            code = exit_.code
    written = err.getvalue()
    if code:
        # What is said before it is about the run: a line each.
        raise Refusal("a traceback" if "Traceback" in written else written.removesuffix("\n").rpartition("\n")[2])


def _refused(message: str) -> Outcome:
    if message == "a traceback" or not message.strip() or not message.isprintable():
        return Outcome("not one printable line", ascii(message)[:1500])
    if len(message) > 1200:
        return Outcome("a very long line", message[:1500])
    return Outcome(REFUSED, message)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
