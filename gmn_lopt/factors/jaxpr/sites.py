"""Activations and tangents in one canonical form ``[S, d]``, and sites: those of the same neurons, paired."""

import functools
import math
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from gmn_lopt.factors.jaxpr.axes import Atoms, Axis, resolve, sizes
from gmn_lopt.factors.jaxpr.axis_rules import Axes
from gmn_lopt.factors.jaxpr.layers import LayerUse, Uses, follow, part_of
from gmn_lopt.factors.kinds import LayerKind
from gmn_lopt.factors.kinds.base import Arrangement
from gmn_lopt.factors.parallel import leave_to_compiler
from gmn_lopt.factors.program import Path, Program, Value


@dataclass(frozen=True)
class Layout:
    """How an array of a program is brought to ``[S, d]``.

    Attributes:
        region: the block of the array that it is.
        shape: the block's shape.
        cut: its shape with axes cut into atoms.
        order: the order of the atoms in the canonical form, those of the set first.
        set_atoms: the atoms of the set, in that order.
        neuron_atoms: those of the neurons.
    """

    region: tuple[slice, ...]
    shape: tuple[int, ...]
    cut: tuple[int, ...]
    order: tuple[int, ...]
    set_atoms: Axis
    neuron_atoms: Axis

    @property
    def canonical_shape(self) -> tuple[int, int]:
        """``[S, d]``."""
        return math.prod(sizes(self.set_atoms)), math.prod(sizes(self.neuron_atoms))

    @property
    def arrangement(self) -> Arrangement:
        """The same in numbers."""
        return Arrangement(self.shape, self.cut, self.order, len(self.set_atoms))

    def canonical(self, array: Shaped[Array, "..."]) -> Shaped[Array, "S d"]:
        """Bring an array of the program to its canonical form."""
        return array[self.region].reshape(self.cut).transpose(self.order).reshape(self.canonical_shape)

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
        """The inverse of :meth:`canonical`, but for what is outside of the block."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return array.reshape([self.cut[i] for i in self.order]).transpose(inverse).reshape(self.shape)


@dataclass(eq=False)
class Kernel:
    """The layers that use one kernel in one way: their sets of factors belong together.

    ``read`` and ``write`` are the indices of its activation and tangent.
    """

    layers: list[LayerUse]
    read: int = -1
    write: int = -1


@dataclass(eq=False)
class Factor:
    """An activation or a tangent: arrays of the program, one after the other along the set.

    Attributes:
        parts: where each of the arrays is found, and its layout.
        set_atoms: the atoms of the set.
        layers: of each kernel that has this factor the layers.
    """

    parts: tuple[tuple[Path, Layout], ...]
    set_atoms: Axis
    layers: list[LayerUse] = field(default_factory=list)

    @property
    def neuron_atoms(self) -> Axis:
        """The atoms of the neurons."""
        return self.parts[0][1].neuron_atoms

    @property
    def shape(self) -> tuple[int, int]:
        """``[S, d]``."""
        return math.prod(sizes(self.set_atoms)), math.prod(sizes(self.neuron_atoms))

    @property
    def index(self) -> int:
        """Place of the first of its layers in program order."""
        return min(layer.index for layer in self.layers)

    def canonical(self, arrays: dict[Path, Array]) -> Shaped[Array, "S d"]:
        """The factor, given the arrays of the program."""
        parts = [
            leave_to_compiler(
                layout.canonical, layout.canonical_spec(jax.typeof(arrays[path]).sharding.spec), arrays[path]
            )
            for path, layout in self.parts
        ]
        return parts[0] if len(parts) == 1 else leave_to_compiler(lambda *x: jnp.concatenate(x), parts[0], *parts)

    def split(self, array: Shaped[Array, "S d"]) -> list[Shaped[Array, "..."]]:
        """Undo :meth:`canonical`: the blocks of the arrays."""
        found, start = [], 0
        for _, layout in self.parts:
            size = layout.canonical_shape[0]
            found.append(layout.original(array[start : start + size]))
            start += size
        return found


class Layouts:
    """Lays out what layers read and write.

    Atoms are in one order for the whole model, so that sets and neurons of two sites can be compared. The union of the
    sets of several uses of a kernel has an atom of its own.
    """

    def __init__(self, axes: dict[Value, Axes], atoms: Atoms) -> None:
        self.axes, self.atoms = axes, atoms
        self.unions: dict[tuple[Axis, ...], Axis] = {}

    def activation(self, layer: LayerUse) -> Layout:
        """That of what is recorded of a layer's activation."""
        value, region = layer.activation, layer.regions[0]
        recorded = layer.kind.recorded_dims(len(value.shape))
        axes = part_of(self.axes[value], region, value.shape, self.atoms)
        region = tuple(part if d in recorded else slice(0, 1) for d, part in enumerate(region))
        return self._arrange(layer, region, tuple(x if d in recorded else () for d, x in enumerate(axes)), 0)

    def output(self, layer: LayerUse) -> Layout:
        """That of a layer's output: its neurons are the dimensions that come from the kernel."""
        value, region = layer.output, layer.regions[1]
        return self._arrange(layer, region, part_of(self.axes[value], region, value.shape, self.atoms), 1)

    def kind(self, layer: LayerUse) -> LayerKind:
        """The kind of a layer, with what it has to know of its layouts."""
        read, written = self.activation(layer).arrangement, self.output(layer).arrangement
        return layer.kind.arranged(layer.equation, read, written, layer.backwards)

    def union(self, layouts: Sequence[Layout]) -> Axis:
        """The set of several uses, of equal neurons."""
        sets = tuple(layout.set_atoms for layout in layouts)
        if len(sets) > 1 and sets not in self.unions:
            self.unions[sets] = self.atoms.new(sum(math.prod(sizes(of)) for of in sets))
        return sets[0] if len(sets) == 1 else self.unions[sets]

    def _arrange(self, layer: LayerUse, region: tuple[slice, ...], axes: Axes, side: int) -> Layout:
        """All set axes come first; those of the loops around the layer are in front of the array's own."""
        scans, neurons = layer.scans, layer.neuron_dims[side]
        neuron_dims = {d for d, scan in enumerate(scans) if scan in layer.stacked} | {len(scans) + d for d in neurons}
        all_axes = (*(self.axes[scan.index][0] for scan in scans), *axes)
        atoms = [(d in neuron_dims, atom) for d, axis in enumerate(all_axes) for atom in resolve(axis)]
        order = sorted(range(len(atoms)), key=lambda i: (atoms[i][0], atoms[i][1].order))
        set_atoms, neuron_atoms = (tuple(atoms[i][1] for i in order if atoms[i][0] is side) for side in (False, True))
        block = (*(slice(0, scan.length) for scan in scans), *region)
        shape = tuple(part.stop - part.start for part in block)
        return Layout(block, shape, sizes(atom for _, atom in atoms), tuple(order), set_atoms, neuron_atoms)


def join(layers: Sequence[LayerUse], layouts: Layouts) -> list[Kernel]:
    """The layers by kernel, in program order. Uses of a kernel belong together if they are of the same neurons."""
    kernels: dict[Hashable, Kernel] = {}
    for layer in layers:
        if layer.view is None:
            value = layer.equation.inputs[layer.operand]
            key: tuple[Hashable, ...] = (value, layer.piece.start)
        else:
            dims = tuple(tuple(d for _, d in of) for of in (layer.inputs, layer.outputs, layer.batch))
            key = (layer.view.leaf, layer.view.block, *dims)
        reads = layouts.activation(layer).neuron_atoms if layer.kind.reads_neurons else ()
        family = layouts.kind(layer).family
        key = (*key, layer.index if family is None else family, reads, layouts.output(layer).neuron_atoms)
        kernels.setdefault(key, Kernel([])).layers.append(layer)
    return list(kernels.values())


def find_reads(kernels: Sequence[Kernel], layouts: Layouts) -> list[Factor]:
    """The distinct activations, in program order."""
    reads: dict[Hashable, Factor] = {}
    first: dict[Hashable, LayerUse] = {}
    for kernel in kernels:
        keys = []
        for layer in kernel.layers:
            neurons = frozenset(layer.neuron_dims[0])
            part = tuple((s.start, s.stop) for s in layer.regions[0])
            keys.append((layer.activation, neurons, part, layer.kind.reads_neurons, layer.scans, layer.stacked))
            first.setdefault(keys[-1], layer)
        parts = [(first[key], layouts.activation(first[key])) for key in keys]
        kernel.read = _factor(reads, tuple(keys), kernel, parts, layouts)
    return list(reads.values())


def find_writes(program: Program, kernels: Sequence[Kernel], layouts: Layouts) -> list[Factor]:
    """The distinct tangents, in program order: of each layer, or of several that are only ever summed."""
    consumers = program.consumers()
    writes: dict[Hashable, Factor] = {}
    first: dict[Hashable, LayerUse] = {}
    for kernel in kernels:
        keys = []
        for layer in kernel.layers:
            end = layer.output
            for equation in follow(layer, consumers):
                end = equation.outputs[0]
            layout = layouts.output(layer)
            part = tuple((s.start, s.stop) for s in layer.regions[1]) if layer.is_part else ()
            keys.append((end, part, layout.set_atoms, layout.neuron_atoms))
            first.setdefault(keys[-1], layer)
        parts = [(first[key], layouts.output(first[key])) for key in keys]
        kernel.write = _factor(writes, tuple(keys), kernel, parts, layouts)
    return list(writes.values())


def _factor(
    factors: dict[Hashable, Factor],
    key: Hashable,
    kernel: Kernel,
    parts: Sequence[tuple[LayerUse, Layout]],
    layouts: Layouts,
) -> int:
    """The index of a factor, which is made where it is new."""
    if key not in factors:
        found = tuple((layer.equation.path, layout) for layer, layout in parts)
        factors[key] = Factor(found, layouts.union([layout for _, layout in parts]))
    factors[key].layers += kernel.layers
    return list(factors).index(key)


@dataclass(eq=False)
class FoundSite:
    """A read, a write, or a pair of both."""

    read: Factor | None
    write: Factor | None

    @property
    def factor(self) -> Factor:
        """Either; they are equal in set and neurons."""
        either = self.write or self.read
        assert either is not None
        return either

    @property
    def position(self) -> tuple[int, bool]:
        """Place in program order; a read comes before the write of the layer that reads it."""
        return self.factor.index, self.write is not None


def pair(reads: list[Factor], writes: list[Factor], uses: Uses) -> list[FoundSite]:
    """Pair each read with the latest preceding write of its neurons that it depends on and that no read has taken.

    In the body of a loop, a read that finds none takes the latest write that it depends on through the carry: of each
    iteration what it begins by reading and what it ends by writing. What is not neurons is at no site.
    """
    partner: dict[Factor, Factor] = {}
    neurons = [read for read in reads if read.layers[0].kind.reads_neurons]
    for through_carries in (False, True):
        for read in neurons:
            ancestors = _ancestors(read, uses, through_carries)
            candidates = [
                write
                for write in writes
                if read not in partner
                and write not in partner.values()
                and write.neuron_atoms == read.neuron_atoms
                and write.set_atoms == read.set_atoms
                and any(ancestors >> layer.index & 1 for layer in write.layers)
            ]
            if candidates:
                partner[read] = max(candidates, key=lambda write: max(layer.index for layer in write.layers))
    sites = [FoundSite(read, partner.get(read)) for read in neurons]
    sites += [FoundSite(None, write) for write in writes if write not in partner.values()]
    return sorted(sites, key=lambda site: site.position)


def _ancestors(read: Factor, uses: Uses, through_carries: bool) -> int:
    carried = [value for scan in read.layers[0].scans for value in scan.next_carries]
    values = carried if through_carries else [layer.activation for layer in read.layers]
    return functools.reduce(operator.or_, (uses.dependence[value].layers for value in values), 0)


def without_batch(
    kernels: Sequence[Kernel], reads: list[Factor], writes: list[Factor], sites: list[FoundSite], uses: Uses
) -> tuple[int, ...]:
    """The places among the factors, reads first, of those whose set has nothing of the data: positions, for example.

    Factors that a layer or a site joins have one set, and data in one of them is in all.
    """
    factors = [*reads, *writes]
    joined = [{reads[kernel.read], writes[kernel.write]} for kernel in kernels]
    joined += [{part for part in (site.read, site.write) if part is not None} for site in sites]
    found = {read for read in reads if any(uses.dependence[layer.activation].data for layer in read.layers)}
    while more := [group for group in joined if group & found and not group <= found]:
        found = found.union(*more)
    return tuple(i for i, factor in enumerate(factors) if factor not in found)
