"""Checks of the fields of frozen dataclasses, with errors in one line."""

import math
from typing import Any


def positive(owner: Any, *names: str) -> None:
    """Raise a ValueError unless these fields are finite numbers above zero."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{type(owner).__name__}.{name} must be positive, not {value!r}")


def fraction(owner: Any, *names: str) -> None:
    """Raise a ValueError unless these fields are numbers of at least 0 and below 1, or tuples of such."""
    for name in names:
        value = getattr(owner, name)
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, bool) or not isinstance(x, int | float) or not 0 <= x < 1:
                raise ValueError(f"{type(owner).__name__}.{name} must be at least 0 and below 1, not {value!r}")


def whole(owner: Any, *names: str, least: int = 1, most: int = 4096) -> None:
    """Raise a ValueError unless these fields are whole numbers in ``[least, most]``."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(
                f"{type(owner).__name__}.{name} must be a whole number of at least {least} and at most {most}, "
                f"not {value!r}"
            )
