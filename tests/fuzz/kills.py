"""Runs that are killed and resumed: each loses nothing on its way, and ends as one that was not: ``make kill``.

Interrupted, it goes on where it stopped; remove ``build/kills`` to begin again.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  sets JAX up like for the tests
import jax

from gmn_lopt.cli import meta_train
from gmn_lopt.meta.metrics import read_rows
from gmn_lopt.optimizers.saved import WEIGHTS_FILE
from gmn_lopt.util.directories import read_directory
from gmn_lopt.util.sealed import CONFIG_FILE, checksum

from .table import print_table

STAGES = ("truncated:meta_steps=8,truncation=5,pairs=2", "nres:meta_steps=8,truncation=2,pairs=2")
ARGUMENTS = ["--task", "linear_regression", "--optimizer", "sgdm", *(f"--stage={text}" for text in STAGES)]
ARGUMENTS += ["--log-every", "1", "--checkpoint-every", "3", "--keep", "2", "--resume"]
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod")
SAME, KILLS = "ends as one that was not", (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Ended well, by a signal, or by a second one while Python could not listen.
ENDS = (0, *(-number for number in KILLS), *(128 + number for number in KILLS[1:]))
LONGEST = 600.0  # seconds of a run, on a machine that has other things to do
FILES = {CONFIG_FILE: 2**20, WEIGHTS_FILE: 2**20}


@dataclass(frozen=True)
class Reference:
    """A run that was not killed: how long it takes, how many file events it has, and what it leaves."""

    seconds: float
    events: int
    left: Any


class Fault(Exception):
    """Something was lost, or is not as it should be."""


def start(out: Path, cache: Path, events: int | None = None) -> int:
    """Begin or resume the run in another process, which kills itself before its file event of this number.

    It is a copy of this one, in which JAX has been loaded, but not used: that saves most of the time.
    """
    child = os.fork()
    if child:
        return child
    try:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the command does before it loads anything
        count = _Count(str(out), events)
        sys.addaudithook(count)
        code = meta_train.cli([*ARGUMENTS, "--out", str(out)])
        out.with_suffix(".events").write_text(str(count.seen))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)


class _Count:
    """An audit hook that counts what is done to the files of a run, and kills before one of them."""

    def __init__(self, place: str, last: int | None):
        self.place, self.last, self.seen = place, last, 0

    def __call__(self, name: str, arguments: tuple) -> None:
        # What is removed with a directory is named within it.
        if name in EVENTS and (name in ("os.remove", "os.rmdir") or str(arguments[0]).startswith(self.place)):
            if self.seen == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen += 1


def wait(child: int, until: Callable[[], bool] = lambda: False) -> int | None:
    """Wait for its end, and return its code (minus the signal that ended it); None: something else came first."""
    limit = time.monotonic() + LONGEST
    while time.monotonic() < limit:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if until():
            return None
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise Fault(f"hangs: has not ended in {LONGEST:.0f} seconds")


def aim_at_moment(out: Path, cache: Path, reference: Reference, rng: random.Random) -> int:
    """SIGKILL at a random moment after the first row of metrics."""
    child, delay = start(out, cache), rng.uniform(0, reference.seconds)
    code = wait(child, lambda: (out / "metrics.jsonl").exists())
    return _send(child, code, delay, signal.SIGKILL)


def aim_at_event(out: Path, cache: Path, reference: Reference, rng: random.Random) -> int:
    """SIGKILL before a random file event."""
    code = wait(start(out, cache, rng.randrange(reference.events)))
    assert code is not None
    return code


def aim_signals(out: Path, cache: Path, reference: Reference, rng: random.Random) -> int:
    """SIGINT or SIGTERM at a random moment, half of the time followed by the other."""
    first, second = rng.sample((signal.SIGINT, signal.SIGTERM), 2)
    both = (first, second) if rng.random() < 0.5 else (first,)
    code = _send(start(out, cache), None, rng.uniform(0.05, reference.seconds), *both)
    if code not in ENDS:
        raise Fault(f"ended with {code} after {first.name}: {_said(out)}")
    return code


AIMS = {"a random moment": aim_at_moment, "before a file event": aim_at_event, "SIGINT, SIGTERM": aim_signals}


def _send(child: int, code: int | None, delay: float, *numbers: int) -> int:
    """Send signals, each after a delay, and return how it ended."""
    for number in numbers:
        if code is None:
            code = wait(child, partial(_is_later_than, time.monotonic() + delay))
        if code is None:
            os.kill(child, number)
            delay /= 10
    code = wait(child) if code is None else code
    assert code is not None
    return code


def _is_later_than(moment: float) -> bool:
    return time.monotonic() > moment


def _said(out: Path) -> str:
    return out.with_suffix(".log").read_text()[-1500:]


def saved(out: Path) -> tuple[int, bool]:
    """The latest checkpoint, and whether there is an optimizer; a Fault if that is not whole."""
    names = [path.name for path in (out / "checkpoints").iterdir()] if (out / "checkpoints").is_dir() else []
    latest = max((int(name) for name in names if name.isdecimal()), default=0)
    if not latest and not (out / "optimizer").exists():
        return 0, False
    try:
        content = read_directory(out / "optimizer", FILES)
        config = json.loads(content[CONFIG_FILE])
        assert config["checksum"] == checksum(config, content[WEIGHTS_FILE])
    except Exception as error:
        raise Fault(f"no whole optimizer beside checkpoint {latest}: {error!r}") from None
    return latest, True


def leaves(out: Path) -> Any:
    """What a run leaves: the names of its files, its optimizers, and its rows but for the time that they took."""
    paths = [path.relative_to(out) for path in out.rglob("*")]
    names = sorted(str(path) for path in paths if len(path.parts) < 3 and path.parts[0] != "events")
    optimizers = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob(WEIGHTS_FILE)}
    rows = [{key: x for key, x in row.items() if key != "inner_steps_per_second"} for row in read_rows(out, 10**6)]
    return {"names": names, "optimizers": optimizers, "rows": rows, "complete": (out / "COMPLETE").read_text()}


def finish(out: Path, cache: Path) -> Any:
    """Resume the run, let it end, and return what it leaves."""
    if code := wait(start(out, cache)):
        raise Fault(f"ended with {code}: {_said(out)}")
    return leaves(out)


def make_reference(place: Path) -> Reference:
    """Run to the end; the first time to compile it."""
    for name in ("first", "reference"):
        begun = time.monotonic()
        left = finish(place / name, place / "cache")
    events = int((place / "reference.events").read_text())
    return Reference(time.monotonic() - begun, events, left)


def trial(name: str, place: Path, reference: Reference, rng: random.Random) -> tuple[int, str, str]:
    """Begin a run, end it up to three times, and finish it: the number of times, what came of it, and details."""
    out, cache, kills, before = place / "run", place / "cache", 0, (0, False)
    try:
        for _ in range(rng.randint(1, 3)):
            code = AIMS[name](out, cache, reference, rng)
            kills += code != 0 or "interrupted" in _said(out)
            if code not in ENDS or "Traceback" in _said(out):
                raise Fault(f"ended with {code}: {_said(out)}")
            after = saved(out)
            if after < before:
                raise Fault(f"there was {before}, and now there is {after}")
            before = after
        left = finish(out, cache)
        wrong = [key for key in left if left[key] != reference.left[key]]
        if wrong:
            extra = {*left["names"]} ^ {*reference.left["names"]}
            return kills, f"other {wrong[0]}", f"{wrong}, {sorted(extra)}, {_said(out)}"
        return kills, SAME, ""
    except Fault as fault:
        return kills, str(fault).partition(":")[0].partition(" beside")[0], str(fault)
    finally:
        for path in (out, out.with_suffix(".log"), out.with_suffix(".events")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def main(count: int, out: Path) -> int:
    """Go on from what is in ``out`` until there are so many kills; print the table; return the number of faults."""
    out.mkdir(parents=True, exist_ok=True)
    done = sum(json.loads(file.read_text())["kills"] for file in out.glob("*.json"))
    with tempfile.TemporaryDirectory() as place:
        reference = make_reference(Path(place)) if done < count else None
        for seed in range(10**6):
            for name in AIMS:
                file = out / f"{seed:04d} {name}.json"
                if done >= count or file.exists() or reference is None:
                    continue
                kills, kind, details = trial(name, Path(place), reference, random.Random(f"{seed} {name}"))
                content = {"name": name, "kills": kills, "counts": {kind: 1}, "faults": details}
                file.with_suffix(".partial").write_text(json.dumps(content, indent=1))
                file.with_suffix(".partial").rename(file)
                done += kills
                if kind != SAME:
                    print(f"{file.stem}: {kind}: {details}", flush=True)
            if done >= count:
                break
    return report(out)


def report(out: Path) -> int:
    """Print how often runs ended how; return the number of faults."""
    table: dict[str, Counter[str]] = {}
    kills: Counter[str] = Counter()
    for file in sorted(out.glob("*.json")):
        content = json.loads(file.read_text())
        table.setdefault(content["name"], Counter()).update(content["counts"])
        kills[content["name"]] += content["kills"]
    runs = Counter({name: row.total() for name, row in table.items()})
    return print_table(table, (SAME,), "ended by", {"runs": runs, "kills": kills})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("build/kills"))
    arguments = parser.parse_args()
    sys.exit(main(arguments.count, arguments.out) > 0)
