"""Frozen dataclasses as JSON and back, checked against their annotations: nothing else is ever built.

A dataclass is an object with its fields, its class by ``name``, and the ``version`` of the class (1 unless it says
otherwise). Where an annotation is an abstract class, the subclasses that have been imported are known by their names.
"""

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gmn_lopt.util.checks import shown

DEEPEST = 16


def to_json(value: Any) -> Any:
    """A nest of dataclasses, tuples, paths, strings and numbers as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"name": type(value).__name__, "version": getattr(value, "version", 1), **named}
    if isinstance(value, tuple | list):
        return [to_json(x) for x in value]
    return str(value) if isinstance(value, Path) else value


def from_json(value: Any, expected: Any, what: str) -> Any:
    """Build what :func:`to_json` wrote.

    Args:
        value: JSON values.
        expected: the annotation of what is to be built.
        what: what it is called in errors.

    Raises:
        ValueError: in one line, what is missing, unknown, of another type or version, or refused by its class.

    Example:
        >>> from_json(to_json(Path("runs")), Path, "out")
        PosixPath('runs')
    """
    if what.count(".") > DEEPEST:
        raise ValueError(f"{what[:40]}... is nested too deeply")
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, args, what)
    if origin is typing.Literal:
        if isinstance(value, str) and value in args:
            return value
        raise ValueError(f"{what} must be one of {', '.join(map(str, args))}, not {shown(value)}")
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{what} must be a list, not {shown(value)}")
        return tuple(from_json(x, args[0], f"{what}[{i}]") for i, x in enumerate(value))
    if expected is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    if dataclasses.is_dataclass(expected):
        return _build(value, list(_concrete(expected)), what)
    of_type = Path(value) if expected is Path and isinstance(value, str) else value
    good = isinstance(of_type, expected) and (expected is bool or not isinstance(of_type, bool))
    if not good or (isinstance(value, float) and not math.isfinite(value)):
        kind = {float: "a finite number", int: "a whole number", bool: "true or false", str: "text", Path: "a path"}
        raise ValueError(f"{what} must be {kind.get(expected, expected.__name__)}, not {shown(value)}")
    return of_type


def _one_of(value: Any, options: tuple[Any, ...], what: str) -> Any:
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    classes = [c for option in rest if dataclasses.is_dataclass(option) for c in _concrete(option)]
    if classes:
        return _build(value, classes, what)
    failures = []
    for option in rest:
        try:
            return from_json(value, option, what)
        except ValueError as error:
            failures.append(str(error))
    raise ValueError(failures[0])


def _concrete(cls: Any) -> Iterator[Any]:
    if not inspect.isabstract(cls):
        yield cls
    for sub in cls.__subclasses__():
        yield from _concrete(sub)


def _build(value: Any, classes: list[Any], what: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object, not {shown(value)}")
    by_name = {c.__name__: c for c in classes}
    name = value.get("name")
    if not isinstance(name, str) or name not in by_name:
        raise ValueError(f"{what} must be one of {', '.join(by_name)}, not {shown(name)}")
    cls = by_name[name]
    version = getattr(cls, "version", 1)
    if type(value.get("version")) is not int or value["version"] != version:
        raise ValueError(f"{what} is version {shown(value.get('version'))} of {name}; this gmn_lopt reads {version}")
    given = {key: x for key, x in value.items() if key not in ("name", "version")}
    known = {f.name for f in dataclasses.fields(cls)}
    for problem, names in (("lacks", known - set(given)), ("has the unknown entry", set(given) - known)):
        if names:
            raise ValueError(f"{what} {problem} {', '.join(shown(n) for n in sorted(names))}")
    hints = typing.get_type_hints(cls)
    built = {key: from_json(x, hints[key], f"{what}.{key}") for key, x in given.items()}
    try:
        return cls(**built)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
