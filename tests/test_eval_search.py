"""The search for settings: the grid is extended until the best is inside of what was tried."""

import math

from gmn_lopt.evaluation.baselines import BASELINES, Axis
from gmn_lopt.evaluation.search import best_place, is_inside, next_places

AXES = (Axis("learning_rate", 1e-3, 2.0), Axis("weight_decay", 0.1, math.sqrt(10), zero_at=-2))


def searched(loss, axes, rounds, count=9):
    """The places tried in each round, and their losses."""
    tried, batches = {}, []
    for _ in range(rounds):
        batches.append(next_places(tried, axes, count))
        tried |= {place: float(loss(place)) for place in batches[-1]}
    return tried, batches


def test_the_first_round_is_a_square():
    assert set(next_places({}, AXES, 9)) == {(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    # Of three settings, the start, its six neighbours, and two more.
    three = next_places({}, (*AXES, AXES[0]), 9)
    assert sorted(math.dist(place, (0, 0, 0)) for place in three) == [0, *[1] * 6, *[math.sqrt(2)] * 2]


def test_the_grid_is_extended_to_where_the_best_is():
    goal = (4, 1)
    tried, batches = searched(lambda place: math.dist(place, goal), AXES, 6)
    insides = [is_inside({p: tried[p] for batch in batches[: n + 1] for p in batch}, AXES) for n in range(6)]
    assert not insides[0], "its best is at an edge"
    assert insides[-1]
    assert best_place(tried, AXES) == goal
    assert {(5, 1), (3, 1), (4, 2), (4, 0)} <= tried.keys()
    assert len(tried) == 6 * 9, "none is tried twice"


def test_there_is_nothing_below_zero():
    """Where no weight decay is best, the zero is the end of the grid, and the search does not go on below it."""
    tried, _ = searched(lambda place: place[0] ** 2 + place[1], AXES, 3)
    assert best_place(tried, AXES) == (0, -2)
    assert is_inside(tried, AXES)
    assert min(place[1] for place in tried) == -2
    rates_only = searched(lambda place: place[0], AXES[:1], 5, 3)[0]
    assert not is_inside(rates_only, AXES[:1]), "a rate has no such end"


def test_losses_that_are_not_finite_are_never_the_best():
    losses = {(0, 0): math.nan, (1, 0): math.inf, (-1, 0): 2.0}
    assert best_place(losses, AXES) == (-1, 0)
    nothing = dict.fromkeys(next_places({}, AXES, 9), math.nan)
    assert best_place(nothing, AXES) == (0, 0)
    assert not is_inside(nothing, AXES)
    assert not nothing.keys() & set(next_places(nothing, AXES, 9))


def test_values_are_on_logarithmic_grids():
    for baseline in BASELINES:
        names = [axis.name for axis in baseline.axes]
        assert names[:2] == ["learning_rate", "weight_decay"]
        for axis in baseline.axes:
            if axis.name == "weight_decay":
                assert [axis.value(i) for i in (-3, -2, -1, 0, 1, 2)] == [0, 0, 0.032, 0.1, 0.32, 1]
            else:
                assert axis.value(3) == 8 * axis.start
                assert axis.value(-2) == axis.start / 4
                assert axis.is_there(-100)
