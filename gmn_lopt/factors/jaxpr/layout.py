"""The canonical form ``[S, d]`` of activations and tangents: all set axes first, in one order for the whole model."""

import math
from dataclasses import dataclass

from jaxtyping import Array, Shaped

from gmn_lopt.factors.jaxpr.axes import Axis, resolve, sizes
from gmn_lopt.factors.jaxpr.axis_rules import Axes


@dataclass(frozen=True)
class Layout:
    """How an array of a program is brought to ``[S, d]``.

    Attributes:
        shape: the array's own shape.
        cut: its shape with axes cut into atoms.
        order: the order of the atoms in the canonical form, those of the set first.
        set_atoms: the atoms of the set, in that order.
        neuron_atoms: those of the neurons.
    """

    shape: tuple[int, ...]
    cut: tuple[int, ...]
    order: tuple[int, ...]
    set_atoms: Axis
    neuron_atoms: Axis

    @property
    def canonical_shape(self) -> tuple[int, int]:
        """``[S, d]``."""
        return math.prod(sizes(self.set_atoms)), math.prod(sizes(self.neuron_atoms))

    def canonical(self, array: Shaped[Array, "..."]) -> Shaped[Array, "S d"]:
        """Bring an array of the program to its canonical form."""
        return array.reshape(self.cut).transpose(self.order).reshape(self.canonical_shape)

    def original(self, array: Shaped[Array, "S d"]) -> Shaped[Array, "..."]:
        """The inverse of :meth:`canonical`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return array.reshape([self.cut[i] for i in self.order]).transpose(inverse).reshape(self.shape)


def arrange(shape: tuple[int, ...], axes: Axes, neuron_dims: set[int]) -> Layout:
    """Lay out an array whose dimensions ``neuron_dims`` are neurons and whose others are the set."""
    atoms = [(d in neuron_dims, atom) for d, axis in enumerate(axes) for atom in resolve(axis)]
    order = sorted(range(len(atoms)), key=lambda i: (atoms[i][0], atoms[i][1].order))
    set_atoms, neuron_atoms = (tuple(atoms[i][1] for i in order if atoms[i][0] is side) for side in (False, True))
    return Layout(shape, sizes(atom for _, atom in atoms), tuple(order), set_atoms, neuron_atoms)
