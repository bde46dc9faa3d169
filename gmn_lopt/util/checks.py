"""Checks of the fields of frozen dataclasses, and of settings, with errors in one line."""

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

LONGEST_HORIZON = 10**7  # inner steps
LONGEST_PATH = 1000  # characters; some are added to it
SMALLEST, LARGEST = 1e-30, 1e12


def number(value: Any) -> bool:
    """Whether it is a finite number, of Python, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def positive(owner: Any, *names: str) -> None:
    """Raise a ValueError unless these fields are numbers above zero, and of a sane size."""
    for name in names:
        value = getattr(owner, name)
        if not number(value) or not value > 0:
            raise ValueError(f"{type(owner).__name__}.{name} must be positive, not {shown(value)}")
        if not SMALLEST <= value <= LARGEST:
            raise ValueError(f"{type(owner).__name__}.{name} must be in [{SMALLEST}, {LARGEST}], not {shown(value)}")


def not_negative(owner: Any, *names: str) -> None:
    """Raise a ValueError unless these fields are zero, or numbers as in :func:`positive`."""
    for name in names:
        value = getattr(owner, name)
        if not number(value) or value < 0:
            raise ValueError(f"{type(owner).__name__}.{name} must be positive, or 0, not {shown(value)}")
        if value:
            positive(owner, name)


def fraction(owner: Any, *names: str, most: int = 64) -> None:
    """Raise a ValueError unless these fields are numbers of at least 0 and below 1, or tuples of few such."""
    for name in names:
        value = getattr(owner, name)
        for x in value if isinstance(value, tuple) else (value,):
            if not number(x) or not 0 <= x < 1:
                raise ValueError(f"{type(owner).__name__}.{name} must be at least 0 and below 1, not {shown(value)}")
        if isinstance(value, tuple) and len(value) > most:
            raise ValueError(f"{type(owner).__name__}.{name} must have at most {most} entries, not {len(value)}")


def whole(owner: Any, *names: str, least: int = 1, most: int = 4096) -> None:
    """Raise a ValueError unless these fields are whole numbers in ``[least, most]``."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(
                f"{type(owner).__name__}.{name} must be a whole number of at least {least} and at most {most}, "
                f"not {shown(value)}"
            )


def path(owner: Any, *names: str) -> None:
    """Raise a ValueError unless these fields are None, or paths that every part of a program takes."""
    for name in names:
        value = getattr(owner, name)
        text = "" if value is None else str(value)
        if len(text) > LONGEST_PATH:
            raise ValueError(
                f"{type(owner).__name__}.{name} must have at most {LONGEST_PATH} characters, not {len(text)}"
            )
        if any(unicodedata.category(x) in ("Cc", "Cs") for x in text):  # Cs: bytes that are not UTF-8
            raise ValueError(f"{type(owner).__name__}.{name} must be a path without control characters, in UTF-8")


def plain_numbers(settings: Mapping[str, Any], most: int = 10**7) -> None:
    """Raise a ValueError if one of the values, or one in a list of them, is a number that nothing can be done with."""
    for name, value in settings.items():
        for x in value if isinstance(value, list | tuple | set) else (value,):
            is_number = isinstance(x, int | float | complex) and not isinstance(x, bool)
            if is_number and (not number(x) or (isinstance(x, int) and abs(x) > most)):
                raise ValueError(f"{name} must be a finite number, if whole of at most {most}, not {shown(x)}")


def settings_of_steps(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError if ``learning_rate`` or ``weight_decay`` is no number that steps can be taken with.

    Schedules and arrays, which may be traced, pass. ``total_steps`` has to be a number of steps.
    """
    total = settings.get("total_steps")
    if total is not None and not (isinstance(total, int) and not isinstance(total, bool) and 1 <= total <= 10**9):
        raise ValueError(f"total_steps must be a whole number of at least 1, not {shown(total)}")
    for name in ("learning_rate", "weight_decay"):
        value = settings.get(name, 0.0)
        is_scalar = value is None or isinstance(value, bool | int | float | complex | str | bytes)
        is_container = isinstance(value, list | tuple | dict | set)
        allowed = (number(value) and 0 <= value <= LARGEST) or value is None
        if (is_scalar or is_container) and not allowed:
            raise ValueError(f"{name} must be a finite number of at least 0, not {shown(value)}")


def shown(value: Any) -> str:
    """A value in a message: a short one as Python writes it, a container by its kind."""
    kinds: dict[type, str] = {list: "a list", tuple: "a list", dict: "an object", set: "a set"}
    if type(value) in kinds:
        return kinds[type(value)]
    if isinstance(value, int) and abs(value) >= 10**36:  # Python refuses to write the longest
        return "a number of more than 36 digits"
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
