"""Activations and tangents in one canonical form ``[S, d]``, and sites: those of the same neurons, paired."""

import functools
import math
import operator
from dataclasses import dataclass, field
from typing import Any

from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from gmn_lopt.factors.jaxpr.axes import Axis, resolve, sizes
from gmn_lopt.factors.jaxpr.axis_rules import Axes
from gmn_lopt.factors.jaxpr.layers import LayerUse, Uses, follow
from gmn_lopt.factors.program import Program, Value


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

    def canonical_spec(self, spec: PartitionSpec) -> PartitionSpec:
        """How the canonical form of an array is spread over devices, one that is spread as ``spec``."""
        sides: tuple[list[Any], list[Any]] = ([], [])
        place = 0
        for size, axes in zip(self.shape, spec):
            start, length = place, 1
            while length < size:
                length *= self.cut[place]
                place += 1
            if axes is not None:
                is_set = start < place and self.order.index(start) < len(self.set_atoms)
                sides[not is_set].extend(axes if isinstance(axes, tuple) else (axes,))
        return PartitionSpec(*(tuple(side) or None for side in sides))

    def original(self, array: Shaped[Array, "S d"]) -> Shaped[Array, "..."]:
        """The inverse of :meth:`canonical`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return array.reshape([self.cut[i] for i in self.order]).transpose(inverse).reshape(self.shape)


@dataclass(eq=False)
class Read:
    """An activation: what is recorded of an array that one layer or several read over the same axes."""

    value: Value
    layout: Layout
    layers: list[LayerUse] = field(default_factory=list)


@dataclass(eq=False)
class Write:
    """A tangent: the output of a layer, or of several that are only ever summed with one another."""

    layout: Layout
    layers: list[LayerUse] = field(default_factory=list)


@dataclass(eq=False)
class FoundSite:
    """A read, a write, or a pair of both."""

    read: Read | None
    write: Write | None

    @property
    def layout(self) -> Layout:
        """That of either; they are equal in set and neurons."""
        either = self.write or self.read
        assert either is not None
        return either.layout

    @property
    def position(self) -> tuple[int, bool]:
        """Place in program order; a read comes before the write of the layer that reads it."""
        if self.write is not None:
            return self.write.layers[0].index, True
        assert self.read is not None
        return self.read.layers[0].index, False


def find_reads(layers: list[LayerUse], axes: dict[Value, Axes]) -> list[Read]:
    """The distinct activations, in program order."""
    reads: dict[Any, Read] = {}
    for layer in layers:
        neurons, _ = layer.neuron_dims
        key = (layer.activation, frozenset(neurons), layer.kind.reads_neurons, layer.scans, layer.stacked)
        if key not in reads:
            recorded = layer.kind.recorded_dims(len(layer.activation.shape))
            shape = tuple(size if d in recorded else 1 for d, size in enumerate(layer.activation.shape))
            value_axes = tuple(x if d in recorded else () for d, x in enumerate(axes[layer.activation]))
            reads[key] = Read(layer.activation, _arrange(layer, axes, shape, value_axes, neurons))
        layer.read, layer.records = list(reads).index(key), not reads[key].layers
        reads[key].layers.append(layer)
    return list(reads.values())


def _arrange(
    layer: LayerUse, axes: dict[Value, Axes], shape: tuple[int, ...], value_axes: Axes, neurons: set[int]
) -> Layout:
    """Lay out an array at a layer, with an axis in front for each loop around it: all set axes first.

    Atoms are in one order for the whole model, so that sets and neurons of two sites can be compared.
    """
    scans = layer.scans
    neuron_dims = {d for d, scan in enumerate(scans) if scan in layer.stacked} | {len(scans) + d for d in neurons}
    all_axes = (*(axes[scan.index][0] for scan in scans), *value_axes)
    atoms = [(d in neuron_dims, atom) for d, axis in enumerate(all_axes) for atom in resolve(axis)]
    order = sorted(range(len(atoms)), key=lambda i: (atoms[i][0], atoms[i][1].order))
    set_atoms, neuron_atoms = (tuple(atoms[i][1] for i in order if atoms[i][0] is side) for side in (False, True))
    cut = sizes(atom for _, atom in atoms)
    return Layout((*(scan.length for scan in scans), *shape), cut, tuple(order), set_atoms, neuron_atoms)


def find_writes(program: Program, layers: list[LayerUse], axes: dict[Value, Axes]) -> list[Write]:
    """The distinct tangents, in program order."""
    consumers = program.consumers()
    writes: dict[tuple[Value, Axis, Axis], Write] = {}
    for layer in layers:
        end = layer.output
        for equation in follow(layer, consumers):
            end = equation.outputs[0]
        layout = arrange_output(layer, axes)
        key = (end, layout.set_atoms, layout.neuron_atoms)
        write = writes.setdefault(key, Write(layout))
        layer.write, layer.perturbed = list(writes).index(key), not write.layers
        write.layers.append(layer)
    return list(writes.values())


def arrange_output(layer: LayerUse, axes: dict[Value, Axes]) -> Layout:
    """Lay out a layer's output: its neurons are the dimensions that come from the parameter."""
    return _arrange(layer, axes, layer.output.shape, axes[layer.output], layer.neuron_dims[1])


def pair(reads: list[Read], writes: list[Write], uses: Uses) -> list[FoundSite]:
    """Pair each read with the latest preceding write of its neurons that it depends on and that no read has taken.

    In the body of a loop, a read that finds none takes the latest write that it depends on through the carry: of each
    iteration what it begins by reading and what it ends by writing. What is not neurons is at no site.
    """
    partner: dict[Read, Write] = {}
    neurons = [read for read in reads if read.layers[0].kind.reads_neurons]
    for through_carries in (False, True):
        for read in neurons:
            ancestors = _ancestors(read, uses, through_carries)
            candidates = [
                write
                for write in writes
                if read not in partner
                and write not in partner.values()
                and write.layout.neuron_atoms == read.layout.neuron_atoms
                and write.layout.set_atoms == read.layout.set_atoms
                and any(ancestors >> layer.index & 1 for layer in write.layers)
            ]
            if candidates:
                partner[read] = max(candidates, key=lambda write: write.layers[-1].index)
    sites = [FoundSite(read, partner.get(read)) for read in neurons]
    sites += [FoundSite(None, write) for write in writes if write not in partner.values()]
    return sorted(sites, key=lambda site: site.position)


def _ancestors(read: Read, uses: Uses, through_carries: bool) -> int:
    carried = [value for scan in read.layers[0].scans for value in scan.next_carries]
    values = carried if through_carries else [read.value]
    return functools.reduce(operator.or_, (uses.dependence[value].layers for value in values), 0)


def without_batch(reads: list[Read], writes: list[Write], sites: list[FoundSite], uses: Uses) -> tuple[int, ...]:
    """The places among the factors, reads first, of those whose set has nothing of the data: positions, for example.

    Factors that a layer or a site joins have one set, and data in one of them is in all.
    """
    factors: list[Read | Write] = [*reads, *writes]
    joined: list[set[Read | Write]]
    joined = [{reads[layer.read], writes[layer.write]} for read in reads for layer in read.layers]
    joined += [{part for part in (site.read, site.write) if part is not None} for site in sites]
    found: set[Read | Write] = {read for read in reads if uses.dependence[read.value].data}
    while more := [group for group in joined if group & found and not group <= found]:
        found = found.union(*more)
    return tuple(i for i, factor in enumerate(factors) if factor not in found)
