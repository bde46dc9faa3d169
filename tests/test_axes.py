import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmn_lopt.factors.jaxpr.axes import Atoms, fix, resolve, sizes


def test_unifying_a_product_with_its_factors_cuts_it():
    atoms = Atoms()
    whole, heads, dims = atoms.new(12), atoms.new(3), atoms.new(4)
    atoms.unify(whole, heads + dims)
    assert sizes(resolve(whole)) == (3, 4)
    assert resolve(whole) == resolve(heads) + resolve(dims)


def test_conflicting_cuts_become_fixed():
    atoms = Atoms()
    a, b = atoms.new(3) + atoms.new(4), atoms.new(4) + atoms.new(3)
    atoms.unify(a, b)
    assert all(atom.fixed for atom in resolve(a + b))


def test_conflict_leaves_other_factors_free():
    atoms = Atoms()
    left, right = atoms.new(5), atoms.new(5)
    atoms.unify(left + atoms.new(3) + atoms.new(4), right + atoms.new(4) + atoms.new(3))
    assert resolve(left) == resolve(right)
    assert not resolve(left)[0].fixed


def test_fixing_reaches_all_members_and_parts():
    atoms = Atoms()
    a, b = atoms.new(6), atoms.new(6)
    atoms.unify(a, b)
    two, three = atoms.reshape((a,), (2, 3))
    fix(b)
    assert resolve(two)[0].fixed and resolve(three)[0].fixed


def test_equal_blocks_are_a_cut_with_the_block_fixed():
    atoms = Atoms()
    axis = atoms.new(12)
    first, second = atoms.block(axis, 12, 0, 4), atoms.block(axis, 12, 4, 8)
    assert resolve(first) == resolve(second)
    assert [atom.fixed for atom in resolve(axis)] == [True, False]


@pytest.mark.parametrize("start, stop", [(0, 5), (3, 7)])
def test_unequal_blocks_are_fixed(start, stop):
    atoms = Atoms()
    axis = atoms.new(12)
    (part,) = atoms.block(axis, 12, start, stop)
    assert part.fixed and part.size == stop - start and resolve(axis)[0].fixed


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_reshape_keeps_sizes_and_row_major_order(shape, data):
    total = math.prod(shape)
    target, rest = [], total
    while rest > 1:
        divisor = data.draw(st.sampled_from([d for d in range(2, rest + 1) if rest % d == 0]))
        target.append(divisor)
        rest //= divisor
    atoms = Atoms()
    axes = atoms.new_axes(shape)
    result = atoms.reshape(axes, target)
    assert [math.prod(sizes(resolve(axis))) for axis in result] == target
    flat_in = [atom for axis in axes for atom in resolve(axis)]
    flat_out = [atom for axis in result for atom in resolve(axis)]
    if not any(atom.fixed for atom in flat_in):
        assert flat_in == flat_out
