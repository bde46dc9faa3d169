"""Axes of arrays as products of atoms, and what makes two of them the same neurons (a union-find with cuts).

An *axis* is a tuple of atoms, row-major: an axis of 12 that is heads times dimensions is ``(heads 3, dimensions 4)``.
An axis of size 1 is the empty product. Two axes that must be permuted together are unified atom by atom; where one is
cut finer than the other, the coarser is cut too. An atom is *fixed* once anything treats its positions as different.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Atom:
    """A class of indivisible factors of axes; a node of the union-find."""

    size: int
    order: int
    fixed: bool
    parent: "Atom | None" = None
    parts: "tuple[Atom, ...] | None" = None


Axis = tuple[Atom, ...]


class Atoms:
    """Creates atoms and numbers them, so that everything derived from them has a deterministic order."""

    def __init__(self) -> None:
        self._count = 0

    def new(self, size: int, fixed: bool = False) -> Axis:
        """A new axis: one atom, or the empty product for size 1."""
        if size == 1:
            return ()
        self._count += 1
        return (Atom(size, self._count, fixed),)

    def new_axes(self, shape: Iterable[int], fixed: bool = False) -> tuple[Axis, ...]:
        """New axes, one for each dimension of a shape."""
        return tuple(self.new(size, fixed) for size in shape)

    def cut(self, atom: Atom, sizes: Sequence[int]) -> None:
        """Cut a root atom into a row-major product of the given sizes, everywhere it stands."""
        atom.parts = tuple(part for size in sizes for part in self.new(size, atom.fixed))

    def unify(self, first: Axis, second: Axis) -> Axis:
        """Declare two axes of equal size to be the same neurons in the same order."""
        a, b = resolve(first), resolve(second)
        while a and b:
            x, y = a[0], b[0]
            if x.size == y.size:
                _union(x, y)
                a, b = a[1:], b[1:]
            elif x.size % y.size == 0 and y.size > 0:
                self.cut(x, (y.size, x.size // y.size))
            elif y.size % x.size == 0 and x.size > 0:
                self.cut(y, (x.size, y.size // x.size))
            else:
                # 12 as 3x4 and as 4x3: no common cut, so no permutation of either is safe.
                i, j = _equal_prefixes([atom.size for atom in a], [atom.size for atom in b])
                fix(a[:i] + b[:j])
                a, b = a[i:], b[j:]
            a, b = resolve(a), resolve(b)
        return resolve(first)

    def reshape(self, axes: Iterable[Axis], shape: Sequence[int]) -> tuple[Axis, ...]:
        """The axes of a row-major reshape, cutting and joining as needed."""
        atoms = resolve([atom for axis in axes for atom in axis])
        result: list[Axis] = []
        shape = list(shape)
        while shape:
            if shape[0] == 1:
                result.append(())
                shape = shape[1:]
                continue
            i, j = _equal_prefixes([atom.size for atom in atoms], shape)
            taken = self._distribute(atoms[:i], shape[:j])
            result.extend(taken)
            atoms, shape = resolve(atoms[i:]), shape[j:]
        return tuple(resolve(axis) for axis in result)

    def _distribute(self, atoms: Axis, shape: Sequence[int]) -> tuple[Axis, ...]:
        result = []
        rest = atoms
        for size in shape:
            axis: Axis = ()
            while size > 1:
                x = rest[0]
                if size % x.size == 0:
                    axis, rest, size = (*axis, x), rest[1:], size // x.size
                elif x.size % size == 0:
                    self.cut(x, (size, x.size // size))
                    rest = resolve(rest)
                else:
                    fix(atoms)
                    return self.new_axes(shape, fixed=True)
            result.append(axis)
        return tuple(result)

    def block(self, axis: Axis, size: int, start: int, stop: int) -> Axis:
        """The axis of a contiguous slice: a position within one of several equal blocks where it is one, else fixed."""
        length = stop - start
        if length == size:
            return resolve(axis)
        if length > 0 and size % length == 0 and start % length == 0:
            block, position = self.reshape((axis,), (size // length, length))
            fix(block)
            return resolve(position)
        fix(axis)
        return self.new(length, fixed=True)


def root(atom: Atom) -> Atom:
    """The representative of an atom's class."""
    while atom.parent is not None:
        if atom.parent.parent is not None:
            atom.parent = atom.parent.parent
        atom = atom.parent
    return atom


def resolve(axis: Iterable[Atom]) -> Axis:
    """An axis in terms of representatives, cut as finely as is known by now."""
    result: list[Atom] = []
    for atom in axis:
        atom = root(atom)
        result.extend((atom,) if atom.parts is None else resolve(atom.parts))
    return tuple(result)


def fix(axis: Iterable[Atom]) -> None:
    """Mark the neurons of an axis as used by position. Always safe: it only gives up a symmetry."""
    for atom in resolve(axis):
        atom.fixed = True


def sizes(axis: Iterable[Atom]) -> tuple[int, ...]:
    """Sizes of the atoms of a resolved axis."""
    return tuple(atom.size for atom in axis)


def _union(x: Atom, y: Atom) -> None:
    if x is y:
        return
    first, second = (x, y) if x.order < y.order else (y, x)
    second.parent = first
    first.fixed |= second.fixed


def _equal_prefixes(a: Sequence[int], b: Sequence[int]) -> tuple[int, int]:
    """Lengths of the shortest non-empty prefixes with equal products."""
    i = j = 1
    while (left := math.prod(a[:i])) != (right := math.prod(b[:j])):
        if left < right and i < len(a):
            i += 1
        elif j < len(b):
            j += 1
        else:
            return len(a), len(b)
    return i, j
