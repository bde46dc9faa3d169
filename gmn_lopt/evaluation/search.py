"""The search for a baseline's settings, on a grid that is extended until the best is inside of what was tried.

A place on the grid is a tuple of whole numbers, one for each setting (:class:`~gmn_lopt.evaluation.baselines.Axis`).
Nothing here trains: losses in, places out.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from gmn_lopt.evaluation.baselines.base import Axis

Place = tuple[int, ...]


def best_place(losses: Mapping[Place, float], axes: Sequence[Axis]) -> Place:
    """The place with the lowest finite loss, the first tried of equals; the grid's start where there is none."""
    finite = [place for place, loss in losses.items() if math.isfinite(loss)]
    return min(finite, key=lambda place: losses[place], default=(0,) * len(axes))


def next_places(losses: Mapping[Place, float], axes: Sequence[Axis], count: int) -> list[Place]:
    """The ``count`` places nearest to the best so far that have not been tried: first those that differ least.

    So the first nine places for two settings are a square of three by three, and where the best of them is at its edge,
    the next are beyond that edge.

    Example:
        >>> axes = (Axis("learning_rate", 1e-3, 2.0), Axis("weight_decay", 0.1, 10.0, zero_at=-1))
        >>> next_places({}, axes, 4)
        [(0, 0), (-1, 0), (0, -1), (0, 1)]
        >>> next_places({(0, 0): 2.0, (1, 0): 1.0}, axes, 2)
        [(1, -1), (1, 1)]
    """
    centre, found, radius = best_place(losses, axes), list[Place](), 0
    while len(found) < count:
        # A cube of this radius holds all places that are as near.
        near = [place for place in _cube(centre, radius, axes) if math.dist(place, centre) <= radius]
        found = [place for place in near if place not in losses]
        radius += 1
    return sorted(found, key=lambda place: (math.dist(place, centre), place))[:count]


def is_inside(losses: Mapping[Place, float], axes: Sequence[Axis]) -> bool:
    """Whether both neighbours of the best place have been tried, along every axis; at a zero there is one only."""
    best = best_place(losses, axes)
    neighbours = [
        (*best[:i], best[i] + step, *best[i + 1 :])
        for i, axis in enumerate(axes)
        for step in (-1, 1)
        if axis.is_there(best[i] + step)
    ]
    return math.isfinite(losses.get(best, math.inf)) and all(place in losses for place in neighbours)


def _cube(centre: Place, radius: int, axes: Sequence[Axis]) -> Iterator[Place]:
    ranges = [
        [x for x in range(middle - radius, middle + radius + 1) if axis.is_there(x)]
        for middle, axis in zip(centre, axes)
    ]
    return itertools.product(*ranges)
