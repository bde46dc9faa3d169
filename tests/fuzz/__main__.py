"""Ten thousand mutations, and a table of what came of them: ``make fuzz``.

Interrupted, it goes on where it stopped; remove ``build/fuzz`` to begin again.
"""

import argparse
import contextlib
import io
import json
import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  sets JAX up like for the tests

from . import documents, flags, runs, saved
from .mutations import FILES
from .outcomes import FINE, Outcome, damaged
from .table import print_table

AT_ONCE = 40  # mutations of each kind in a round
Found = Iterator[tuple[str, Outcome]]


def files(make: Callable, cases: Callable, read: Callable, refusals: Any, place: Path, seed: int) -> Found:
    """A round of damage to files."""
    pristine = place / "pristine"
    make(pristine)
    expected = read(pristine)
    for case in cases(pristine, random.Random(seed), AT_ONCE):
        if seed == 0 or case.name.rpartition(": ")[2] not in FILES:  # kinds of files are always the same
            yield case.name, damaged(case, pristine, place, read, refusals, expected)


def senseless(place: Path, seed: int) -> Found:
    """A round of flags."""
    for name, given, must_be_refused in flags.some(random.Random(seed), 4 * AT_ONCE):
        yield f"{name} {ascii(given)[:200]}", flags.called(name, given, must_be_refused, place / "here")


def targets() -> dict[str, Callable[[Path, int], Found]]:
    """All kinds of input by name."""
    found: dict[str, Callable[[Path, int], Found]] = {}
    for name in saved.KINDS:
        make, read, read_signed = (partial(f, name=name) for f in (saved.make, saved.read, saved.read_signed))
        found[f"saved {name}"] = partial(files, make, saved.cases, read, saved.REFUSALS)
        found[f"signed {name}"] = partial(files, make, saved.signed_cases, read_signed, saved.REFUSALS)
    found["runs"] = partial(files, runs.make, runs.cases, runs.read_sound, runs.REFUSALS)
    found["runs, unsigned"] = partial(files, runs.make, runs.unsigned_cases, runs.read_any, runs.REFUSALS)
    found["metrics"] = partial(files, runs.make, runs.metrics_cases, runs.read_sound, runs.REFUSALS)
    cards = (documents.make, documents.card_cases, documents.read_card, documents.REFUSALS)
    results = (documents.make, documents.results_cases, documents.read_results, documents.REFUSALS)
    return found | {"cards": partial(files, *cards), "results": partial(files, *results), "flags": senseless}


def main(count: int, out: Path) -> int:
    """Go on from what is in ``out`` until there are so many; print the table; return the number of faults."""
    out.mkdir(parents=True, exist_ok=True)
    seed = 0
    while sum(map(sum_of, sorted(out.glob("*.json")))) < count:
        for name, target in targets().items():
            file = out / f"{seed:04d} {name}.json"
            if not file.exists():
                with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
                    found = [(case, outcome.kind, outcome.details) for case, outcome in target(Path(place), seed)]
                faults = [row for row in found if row[1] not in FINE]
                content = {"name": name, "counts": Counter(kind for _, kind, _ in found), "faults": faults}
                file.with_suffix(".partial").write_text(json.dumps(content, indent=1))
                file.with_suffix(".partial").rename(file)
                for case, kind, details in faults:
                    print(f"{name}, {case}: {kind}: {details}")
        seed += 1
    return report(out)


def sum_of(file: Path) -> int:
    """The number of mutations in a round."""
    return sum(json.loads(file.read_text())["counts"].values())


def report(out: Path) -> int:
    """Print how often what came of which kind of input; return the number of faults."""
    found: dict[str, Counter[str]] = {}
    for file in sorted(out.glob("*.json")):
        content = json.loads(file.read_text())
        found.setdefault(content["name"], Counter()).update(content["counts"])
    return print_table(found, FINE, "input", {"mutations": Counter({name: x.total() for name, x in found.items()})})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)  # orbax says much about what is damaged
    sys.exit(main(arguments.count, arguments.out) > 0)
