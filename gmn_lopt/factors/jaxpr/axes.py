"""Axes of arrays as products of atoms, and what makes two of them the same neurons (a union-find with cuts).

An *axis* is a tuple of atoms, row-major: an axis of 12 that is heads times dimensions is ``(heads 3, dimensions 4)``.
An axis of size 1 is the empty product. Two axes that must be permuted together are unified atom by atom; where one is
cut finer than the other, the coarser is cut too. An atom is *fixed* once anything treats its positions as different.

The atom of a concatenation is a *direct sum* of axes, its ``summands``, from which slices take them again. Whatever
else is done to it fixes them: no permutation of a sum as a whole is a permutation of each of its parts.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Atom:
    """A class of indivisible factors of axes; a node of the union-find."""

    size: int
    order: tuple[int, ...]
    fixed: bool
    parent: "Atom | None" = None
    parts: "tuple[Atom, ...] | None" = None
    summands: "tuple[tuple[int, tuple[Atom, ...]], ...]" = ()


Axis = tuple[Atom, ...]


class Atoms:
    """Creates atoms and numbers them, so that everything derived from them has a deterministic order."""

    def __init__(self) -> None:
        self._count = 0
        self._blocks: dict[tuple[Axis, int, int], Axis] = {}

    def new(self, size: int, fixed: bool = False) -> Axis:
        """A new axis: one atom, or the empty product for size 1."""
        if size == 1:
            return ()
        self._count += 1
        return (Atom(size, (self._count,), fixed),)

    def new_axes(self, shape: Iterable[int], fixed: bool = False) -> tuple[Axis, ...]:
        """New axes, one for each dimension of a shape."""
        return tuple(self.new(size, fixed) for size in shape)

    def cut(self, atom: Atom, sizes: Sequence[int]) -> None:
        """Cut a root atom into a row-major product of the given sizes, everywhere it stands."""
        fix_sum(atom)
        # The parts take the place of the whole in the order of all atoms.
        atom.parts = tuple(Atom(size, (*atom.order, i), atom.fixed) for i, size in enumerate(sizes) if size != 1)

    def unify(self, first: Axis, second: Axis) -> Axis:
        """Declare two axes of equal size to be the same neurons in the same order."""
        a, b = resolve(first), resolve(second)
        while a and b:
            x, y = a[0], b[0]
            if x.size == y.size:
                self._union(x, y)
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

    def join(self, parts: Sequence[tuple[int, Axis]]) -> Axis:
        """The axis of a concatenation, given the sizes and axes of its parts."""
        parts = [part for part in parts if part[0] > 0]
        if len(parts) == 1:
            return resolve(parts[0][1])
        axis = self.new(sum(size for size, _ in parts))
        for atom in axis:
            atom.summands = tuple(parts)
        return axis

    def _union(self, x: Atom, y: Atom) -> None:
        if x is y:
            return
        first, second = (x, y) if x.order < y.order else (y, x)
        if first.summands and second.summands:
            if [size for size, _ in first.summands] == [size for size, _ in second.summands]:
                for (_, a), (_, b) in zip(first.summands, second.summands):
                    self.unify(a, b)
            else:
                fix_sum(first)
                fix_sum(second)
        # What was united above may have cut either of them: then they are united part by part.
        if first.parent or second.parent or first.parts or second.parts:
            self.unify((first,), (second,))
            return
        second.parent = first
        first.summands = first.summands or second.summands
        first.fixed |= second.fixed
        if first.fixed:
            fix((first,))

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
        """The axis of a contiguous slice: summands, or a position within one of several equal blocks, or else fixed."""
        length = stop - start
        if length == size:
            return resolve(axis)
        if (parts := _between(axis, start, stop)) is not None:
            return self.join(parts)
        if length > 0 and size % length == 0 and start % length == 0:
            block, position = self.reshape((axis,), (size // length, length))
            fix(block)
            return resolve(position)
        fix(axis)
        # Equal slices are the same neurons, whatever is done with them.
        key = (resolve(axis), start, stop)
        return resolve(self._blocks.setdefault(key, self.new(length, fixed=True)))


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
        if not (atom.fixed and not atom.summands):
            atom.fixed = True
            fix_sum(atom)


def fix_sum(atom: Atom) -> None:
    """Give up the symmetry of a direct sum's parts; of any other atom nothing happens."""
    summands, atom.summands = atom.summands, ()
    atom.fixed |= bool(summands)
    for _, axis in summands:
        fix(axis)


def _between(axis: Iterable[Atom], start: int, stop: int) -> list[tuple[int, Axis]] | None:
    """The summands of an axis that fill a slice of it; None where none do."""
    atoms = resolve(axis)
    if len(atoms) != 1 or not atoms[0].summands:
        return None
    begin, found = 0, []
    for part in atoms[0].summands:
        if start <= begin < stop:
            found.append((begin, part))
        begin += part[0]
    if not found or found[0][0] != start or found[-1][0] + found[-1][1][0] != stop:
        return None
    return [part for _, part in found]


def sizes(axis: Iterable[Atom]) -> tuple[int, ...]:
    """Sizes of the atoms of a resolved axis."""
    return tuple(atom.size for atom in axis)


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
