"""Deterministic damage: to bytes, to JSON documents, to files."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What takes the place of a value in a JSON document, as it is written there.
JSON_VALUES = {
    "null": "null",
    "list": "[1]",
    "object": '{"name": 1}',
    "text": '"text"',
    "empty text": '""',
    "control characters": '"\\u0000\\u001b[31m\\n\\ud800"',
    "true": "true",
    "fraction": "0.5",
    "minus one": "-1",
    "zero": "0",
    "two": "2",
    "100000": "100000",
    "2^31": str(2**31),
    "2^63": str(2**63),
    "30 digits": "1" * 30,
    "4,000 digits": "1" * 4000,
    "5,000 digits": "1" * 5000,
    "NaN": "NaN",
    "minus infinity": "-Infinity",
    "1e400": "1e400",
    "1e-320": "1e-320",
    "1e300": "1e300",
    "1,000 brackets": "[" * 1000 + "]" * 1000,
    "300 brackets": "[" * 300 + "]" * 300,
    "100,000 brackets": "[" * 100_000,
    "expression": "\"__import__('os').system('touch planted')\"",
}
PICKLE = b"cos\nsystem\n(S'touch planted'\ntR."
FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda file: None,
    "empty": lambda file: file.write_bytes(b""),
    "directory": lambda file: file.mkdir(),
    "pipe": lambda file: os.mkfifo(file),
    "loop of links": lambda file: file.symlink_to(file.name),
    "device": lambda file: file.symlink_to("/dev/zero"),
    "no permission": lambda file: [file.write_bytes(b"{}"), file.chmod(0)],
    "pickle": lambda file: file.write_bytes(PICKLE),
    "protocol 4 pickle": lambda file: file.write_bytes(b"\x80\x04\x95" + PICKLE),
    "expression": lambda file: file.write_bytes(b"__import__('os').system('touch planted')"),
    "not UTF-8": lambda file: file.write_bytes(b"\xff\xfe\x00{}"),
    "a terabyte": lambda file: [file.write_bytes(b"{"), os.truncate(file, 2**40)],
}


@dataclass(frozen=True)
class Case:
    """One kind of damage, which is done to a directory."""

    name: str
    apply: Callable[[Path], object]


def replace_file(name: str, kind: str) -> Case:
    """Another kind of file in place of a file."""

    def apply(directory: Path) -> None:
        file = directory / name
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        FILES[kind](file)

    return Case(f"{name}: {kind}", apply)


def write(name: str, content: bytes, what: str) -> Case:
    """Other content in a file."""
    return Case(f"{name}: {what}", lambda directory: (directory / name).write_bytes(content))


def damaged_bytes(name: str, content: bytes, rng: random.Random, count: int) -> Iterator[Case]:
    """Truncated, flipped, zeroed, overwritten, doubled and lengthened content."""
    for _ in range(count):
        at, kind = rng.randrange(max(1, len(content))), rng.randrange(7)
        length = rng.randrange(1, 40)
        changed, what = bytearray(content), f"{at}"
        if kind == 0:
            changed, what = changed[:at], f"cut at {at}"
        elif kind == 1:
            bit = rng.randrange(8)
            changed[at] ^= 1 << bit
            what = f"bit {bit} of byte {at} flipped"
        elif kind == 2:
            changed[at : at + length] = bytes(len(changed[at : at + length]))
            what = f"{length} zeros at {at}"
        elif kind == 3:
            changed[at : at + length] = rng.randbytes(length)
            what = f"{length} random bytes at {at}"
        elif kind == 4:
            changed[at:at] = changed[at : at + length]
            what = f"{length} bytes at {at} twice"
        elif kind == 5:
            del changed[at : at + length]
            what = f"{length} bytes at {at} missing"
        else:
            changed += rng.randbytes(length)
            what = f"{length} random bytes at the end"
        yield write(name, bytes(changed), what)


def damaged_json(document: Any, values: dict[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """The text of a JSON document with each value replaced, each entry missing, twice, or under another name."""
    for path in _paths(document):
        shown = ".".join(map(str, path))
        for what, text in (JSON_VALUES if values is None else values).items():
            yield f"{shown} = {what}", _text(document, path, text)
        if path and isinstance(path[-1], str):
            parent = _get(document, path[:-1])
            without = {key: x for key, x in parent.items() if key != path[-1]}
            yield f"without {shown}", _text(document, path[:-1], json.dumps(without))
            renamed = without | {"other": parent[path[-1]]}
            yield f"{shown} renamed", _text(document, path[:-1], json.dumps(renamed))
            twice = json.dumps(parent)[:-1] + f", {json.dumps(path[-1])}: 1" + "}"
            yield f"{shown} twice", _text(document, path[:-1], twice)


def _paths(document: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The places of all values, containers among them."""
    yield path
    lists = enumerate(document) if isinstance(document, list) else ()
    for key, value in document.items() if isinstance(document, dict) else lists:
        yield from _paths(value, (*path, key))


def _get(document: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def _text(document: Any, path: tuple[str | int, ...], text: str) -> str:
    """The document with this text in place of the value at a path."""
    if not path:
        return text
    mark = "<the place of another text>"
    changed = json.loads(json.dumps(document))
    _get(changed, path[:-1])[path[-1]] = mark
    return json.dumps(changed, indent=1).replace(json.dumps(mark), text)
