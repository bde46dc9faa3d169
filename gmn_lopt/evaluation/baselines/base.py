"""What a baseline is: an optimizer with a schedule, and the grid on which it is tuned."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optax
from jaxtyping import Array, Float

Scalar = float | Float[Array, ""]

WARMUP = 0.05
"""The part of the horizon in which the learning rate rises."""


def scheduled(peak: Scalar, total_steps: int) -> optax.Schedule:
    """The learning rate of every baseline: a linear warm-up from 0, then a cosine to 0 at the horizon.

    Args:
        peak: the highest rate, at the end of the warm-up. May be traced.
        total_steps: the horizon; 5 % of it, one step at least, are the warm-up.

    Example:
        >>> schedule = scheduled(0.1, 200)
        >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 105, 200)]
        [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    warmup = max(1, round(WARMUP * total_steps))
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(total_steps, warmup + 1))
    return lambda step: peak * shape(step)  # optax wants to know whether a peak is 0


@dataclass(frozen=True)
class Axis:
    """One setting of a baseline, on a grid with logarithmic steps that has no end.

    Attributes:
        name: the argument of the constructor.
        start: the value at place 0, where the search begins.
        ratio: of a value to the one before.
        zero_at: from this place down the value is 0, where a value so small has no effect; None: never.

    Example:
        >>> axis = Axis("weight_decay", 0.1, 10.0, zero_at=-2)
        >>> [axis.value(place) for place in (-2, -1, 0, 1)]
        [0.0, 0.01, 0.1, 1.0]
    """

    name: str
    start: float
    ratio: float
    zero_at: int | None = None

    def value(self, place: int) -> float:
        """The value at a place, to two digits."""
        if self.zero_at is not None and place <= self.zero_at:
            return 0.0
        return float(f"{self.start * self.ratio**place:.2g}")

    def is_there(self, place: int) -> bool:
        """Whether there is such a place: below the first zero there is none."""
        return self.zero_at is None or place >= self.zero_at


def rates(start: float, name: str = "learning_rate") -> Axis:
    """Peak learning rates, each twice the one before."""
    return Axis(name, start, 2.0)


def decays() -> Axis:
    """Weight decays: 0, 0.032, 0.1, 0.32, and so on. A step multiplies them by the learning rate."""
    return Axis("weight_decay", 0.1, math.sqrt(10), zero_at=-2)


@dataclass(frozen=True)
class Baseline:
    """An optimizer that others are compared with.

    Attributes:
        name: its name in flags and reports.
        construct: ``construct(total_steps, **settings)``, the transformation; traceable in the settings.
        axes: the settings that are tuned.
    """

    name: str
    construct: Callable[..., optax.GradientTransformation]
    axes: tuple[Axis, ...]

    def settings(self, place: Sequence[int]) -> dict[str, float]:
        """The settings at a place of the grid, one whole number for each axis."""
        return {axis.name: axis.value(i) for axis, i in zip(self.axes, place)}


@dataclass(frozen=True)
class Scheduled:
    """Makes a baseline for one horizon, from its settings. Equal ones share compiled programs."""

    construct: Callable[..., optax.GradientTransformation]
    total_steps: int

    def __call__(self, settings: Mapping[str, Any]) -> optax.GradientTransformation:
        """The transformation with these settings, numbers or arrays."""
        return self.construct(self.total_steps, **settings)


def as_matrix(x: Float[Array, "..."]) -> Float[Array, "rows columns"]:
    """A tensor as a matrix, its last axis (the outputs of a layer) against all others; a vector as one row."""
    return x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
