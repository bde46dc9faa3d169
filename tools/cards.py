"""Model cards: what a complete one has, and how it is written."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import gmn_lopt
from gmn_lopt.optimizers.saved import digest, load_learned, load_spaces
from gmn_lopt.optimizers.shipped import CARD_FILE
from gmn_lopt.util.files import read_json

FORMAT = "gmn_lopt model card"
VERSION = 1
DIGITS = 5
LARGEST_CARD = 100_000  # bytes
LARGEST = 1_000_000  # bytes, of everything that one optimizer ships
FILES = {"config.json", "phi.safetensors", CARD_FILE}

# Entries of a card by their path; "*" is every item of a list, of which there has to be one at least.
REQUIRED: Mapping[str, type | tuple[type, ...]] = {
    "format": str,
    "version": int,
    "name": str,
    "description": str,
    "licence": str,
    "weights.digest": str,
    "weights.count": int,
    "training.tasks.*": str,
    "training.meta_steps": int,
    "training.inner_steps": int,
    "training.seconds": (int, float, type(None)),
    "training.hardware": str,
    "training.seeds.*": int,
    "training.recipe": dict,
    "training.versions.jax": str,
    "training.commands.train": str,
    "training.commands.continue": str,
    "evaluations.*.task": str,
    "evaluations.*.settings.horizon": int,
    "evaluations.*.settings.smoothing": int,
    "evaluations.*.environment.device": str,
    "evaluations.*.baseline.learning_rate": float,
    "evaluations.*.adam.best_test_loss.mean": float,
    "evaluations.*.adam.seconds_per_step.median": float,
    "evaluations.*.optimizers.*.misses": int,
    "evaluations.*.optimizers.*.step_reduction": dict,
    "evaluations.*.optimizers.*.training_time_speed_up": dict,
    "evaluations.*.optimizers.*.best_test_loss.mean": (float, type(None)),
    "evaluations.*.optimizers.*.seconds_per_step.median": float,
    "evaluations.*.optimizers.*.seeds.*.seed": int,
    "evaluations.*.optimizers.*.command": str,
}


def card_problems(card: Any) -> list[str]:
    """What a card lacks, each in one line; empty for a complete one."""
    problems = []
    for path, types in REQUIRED.items():
        for place, value in _entries(card, path.split(".")):
            if not isinstance(value, types) or value == "":
                problems.append(f"{CARD_FILE}: {place} is missing or of the wrong kind")
    if not problems:
        if (card["format"], card["version"]) != (FORMAT, VERSION):
            problems.append(f"{CARD_FILE}: format and version are not {FORMAT!r} and {VERSION}")
        if "\n" in card["description"]:
            problems.append(f"{CARD_FILE}: description is more than one line")
    problems += [
        f"{CARD_FILE}: {place} names a place on one machine: {text}"
        for place, text in _texts(card)
        if re.search(r"(^|[\s='\"])(/\w|~/|[A-Z]:\\)", text)
    ]
    return sorted(set(problems))


def directory_problems(directory: Path) -> list[str]:
    """What keeps a directory from being shipped, each in one line; empty for a complete one."""
    files = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    if files != FILES:
        return [f"{directory.name}: holds {', '.join(sorted(files))}, not {', '.join(sorted(FILES))}"]
    problems = []
    for limit, sizes in (
        (LARGEST, [path.stat().st_size for path in directory.iterdir()]),
        (LARGEST_CARD, [(directory / CARD_FILE).stat().st_size]),
    ):
        if sum(sizes) > limit:
            what = CARD_FILE if limit == LARGEST_CARD else "all of it"
            problems.append(f"{what} has {sum(sizes)} bytes, more than {limit}")
    try:
        card = read_json(directory / CARD_FILE)
        _, phi = load_learned(directory, some_structure(directory))
    except ValueError as error:
        return [f"{directory.name}: {error}"]
    problems += card_problems(card)
    if not problems and card["weights"]["digest"] != digest(phi):
        problems.append(f"{CARD_FILE}: weights.digest is of other meta-parameters")
    return [f"{directory.name}: {problem}" for problem in problems]


def some_structure(directory: Path) -> gmn_lopt.GradientStructure:
    """A structure to load a saved optimizer with: any will do, but for an ``unf``, which says what leaves it is for."""
    leaves = load_spaces(directory)
    if leaves is None:
        return gmn_lopt.analyze(lambda p, x: jnp.mean((x @ p) ** 2), jnp.ones((3, 2)), jnp.ones((4, 3)))
    shapes = [(2,) * len(spaces) for spaces in leaves]
    return gmn_lopt.GradientStructure(
        spaces=tuple(gmn_lopt.Space(2, True) for _ in {space for spaces in leaves for space in spaces}),
        sites=(),
        parameters=tuple(
            gmn_lopt.Parameter(f"[{i}]", shape, "float32", shape, spaces, (), "unfactored")
            for i, (shape, spaces) in enumerate(zip(shapes, leaves))
        ),
        layers=(),
        treedef=jax.tree.structure([0] * len(leaves)),
        activation_shapes=(),
        tangent_shapes=(),
    )


def count(phi: Any) -> int:
    """The number of meta-parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(phi))


def rounded(value: Any) -> Any:
    """The JSON value with all numbers rounded to 5 significant digits, and None for those that are not finite."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def readable(value: Any) -> str:
    """JSON text, indented, but with lists of numbers on one line."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    one_line = lambda found: "[" + ", ".join(part.strip() for part in found[1].split(",")) + "]"  # noqa: E731
    # A string has no line breaks in JSON: these are the lists' own.
    return re.sub(r"\[\n((?:\s*(?:-?\d[-+.\deE]*|null),?\n)+)\s*\]", one_line, text) + "\n"


def _entries(value: Any, path: list[str], place: str = "") -> Iterator[tuple[str, Any]]:
    """All values at a path; a missing one as ``...``, which is of no kind that is asked for."""
    if not path:
        yield place, value
        return
    key, rest = path[0], path[1:]
    here = f"{place}.{key}" if place else key
    if key == "*":
        if not isinstance(value, list) or not value:
            yield here, ...
            return
        for i, item in enumerate(value):
            yield from _entries(item, rest, f"{place}.{i}")
    elif isinstance(value, Mapping) and key in value:
        yield from _entries(value[key], rest, here)
    else:
        yield here, ...


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _texts(item, f"{place}.{key}" if place else str(key))
