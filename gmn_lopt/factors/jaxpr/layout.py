"""The canonical form ``[S, d]`` of activations and tangents: all set axes first, in one order for the whole model."""

import math
from dataclasses import dataclass

from jaxtyping import Array, Shaped

from gmn_lopt.factors.jaxpr.axes import Atom, Axis, resolve
from gmn_lopt.factors.jaxpr.axis_rules import Axes


@dataclass(frozen=True)
class Layout:
    """How an array of a program is brought to ``[S, d]``.

    Attributes:
        shape: the array's own shape.
        cut: its shape with axes cut into atoms.
        order: the order of the atoms in the canonical form, those of the set first.
        set_size: ``S``.
    """

    shape: tuple[int, ...]
    cut: tuple[int, ...]
    order: tuple[int, ...]
    set_size: int

    def canonical(self, array: Shaped[Array, "..."]) -> Shaped[Array, "S d"]:
        """Bring an array of the program to its canonical form."""
        return array.reshape(self.cut).transpose(self.order).reshape(self.set_size, -1)

    def original(self, array: Shaped[Array, "S d"]) -> Shaped[Array, "..."]:
        """The inverse of :meth:`canonical`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return array.reshape([self.cut[i] for i in self.order]).transpose(inverse).reshape(self.shape)


@dataclass(frozen=True)
class Arranged:
    """A layout together with the atoms of the set and of the neurons, each in canonical order."""

    layout: Layout
    set_atoms: Axis
    neuron_atoms: Axis

    @property
    def size(self) -> int:
        """Number of neurons."""
        return math.prod(atom.size for atom in self.neuron_atoms)


def arrange(shape: tuple[int, ...], axes: Axes, neuron_dims: set[int]) -> Arranged:
    """Lay out an array whose dimensions ``neuron_dims`` are neurons and whose others are the set."""
    entries: list[tuple[bool, int, int, Atom]] = []
    for d, axis in enumerate(axes):
        for atom in resolve(axis):
            entries.append((d in neuron_dims, atom.order, len(entries), atom))
    ordered = sorted(entries, key=lambda entry: entry[:3])
    set_atoms = tuple(entry[3] for entry in ordered if not entry[0])
    neurons = tuple(entry[3] for entry in ordered if entry[0])
    layout = Layout(
        shape,
        tuple(entry[3].size for entry in entries),
        tuple(entry[2] for entry in ordered),
        math.prod(atom.size for atom in set_atoms),
    )
    return Arranged(layout, set_atoms, neurons)
