"""From a program to its :class:`gmn_lopt.GradientStructure`, and to the taps that yield its factors."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.extend.core import ClosedJaxpr

from gmn_lopt.factors.jaxpr.axes import Atom, Atoms, Axis, resolve
from gmn_lopt.factors.jaxpr.axis_rules import Axes, apply_rule
from gmn_lopt.factors.jaxpr.layers import LayerUse, Uses, find_layers, label, trace_view
from gmn_lopt.factors.jaxpr.reconstruct import layer_gradients
from gmn_lopt.factors.jaxpr.sites import (
    FoundSite,
    Read,
    Write,
    arrange_output,
    find_reads,
    find_writes,
    pair,
    without_batch,
)
from gmn_lopt.factors.jaxpr.stacks import copies, independent_stacks
from gmn_lopt.factors.program import Path, Program, Value, flatten
from gmn_lopt.factors.spaces import Parameter, Site, SiteRef, Space
from gmn_lopt.factors.structure import GradientStructure, Layer


@dataclass(frozen=True)
class Traced:
    """A structure, with what it takes to compute factors from the jaxpr that it was found in."""

    structure: GradientStructure
    closed: ClosedJaxpr
    taps: dict[Path, LayerUse]
    reads: list[Read]
    writes: list[Write]
    without_batch: tuple[int, ...]


def walk(program: Program) -> dict[Value, Axes]:
    """The axes of every value of a program."""
    atoms = Atoms()
    axes: dict[Value, Axes] = {value: atoms.new_axes(value.shape) for value in program.parameters}
    for value in [*program.data, *program.constants]:
        axes[value] = atoms.new_axes(value.shape, fixed=True)
    for equation in program.equations:
        inputs = [axes.setdefault(value, ()) for value in equation.inputs]
        axes.update(zip(equation.outputs, apply_rule(atoms, equation, inputs)))
    return axes


def assemble(
    closed: ClosedJaxpr, names: Sequence[str], dtypes: Sequence[str], treedef: jax.tree_util.PyTreeDef
) -> Traced:
    """Analyse a loss given as a jaxpr: parameters first among its inputs, the loss first among its outputs."""
    program = flatten(closed, len(names))
    axes = walk(program)
    uses = find_layers(program)
    layers = label(program, uses, axes)
    reads = find_reads(layers, axes)
    writes = find_writes(program, layers, axes)
    found = pair(reads, writes, uses)
    references = _references(program, axes, layers, found, reads, writes)
    stacks = independent_stacks(program, axes)
    space, set_axis = _Numbering(), _Numbering()
    sites = tuple(
        Site(
            spaces=tuple(map(space, site.layout.neuron_atoms)),
            size=site.layout.canonical_shape[1],
            set_size=site.layout.canonical_shape[0],
            set_axes=tuple(map(set_axis, site.layout.set_atoms)),
            activation=None if site.read is None else reads.index(site.read),
            tangent=None if site.write is None else writes.index(site.write),
            copies=copies(site.layout.neuron_atoms, program, axes, stacks),
        )
        for site in found
    )
    parameters = []
    for leaf, value in enumerate(program.parameters):
        cut = _cut(axes[value])
        status, reason = _status(leaf, layers, uses)
        parameters.append(
            Parameter(
                name=names[leaf],
                shape=value.shape,
                dtype=dtypes[leaf],
                cut_shape=tuple(atom.size for atom in cut),
                spaces=tuple(map(space, cut)),
                sites=references[leaf] if leaf in references else _following_read(leaf, cut, found, uses),
                status=status,
                reason=reason,
            )
        )
    structure = GradientStructure(
        spaces=tuple(
            Space(atom.size, not atom.fixed, tuple(space(s) for s in stacks.get(atom, ()) if s in space.atoms))
            for atom in space.atoms
        ),
        sites=sites,
        parameters=tuple(parameters),
        layers=tuple(
            Layer(
                kind=layer.kind,
                kernel=layer.view.leaf,
                bias=None if layer.bias is None else layer.bias.view.leaf,
                activation=layer.read,
                tangent=layer.write,
                gradients=layer_gradients(program, layer, reads[layer.read].layout, arrange_output(layer, axes)),
            )
            for layer in layers
        ),
        treedef=treedef,
        activation_shapes=tuple(read.layout.canonical_shape for read in reads),
        tangent_shapes=tuple(write.layout.canonical_shape for write in writes),
    )
    taps = {layer.equation.path: layer for layer in layers}
    return Traced(structure, closed, taps, reads, writes, without_batch(reads, writes, found, uses))


class _Numbering:
    """Numbers atoms in the order in which they are first asked for."""

    def __init__(self) -> None:
        self.atoms: list[Atom] = []

    def __call__(self, atom: Atom) -> int:
        if atom not in self.atoms:
            self.atoms.append(atom)
        return self.atoms.index(atom)


def _cut(axes: Axes) -> Axis:
    return tuple(atom for axis in axes for atom in resolve(axis))


def _references(
    program: Program,
    axes: dict[Value, Axes],
    layers: list[LayerUse],
    found: list[FoundSite],
    reads: list[Read],
    writes: list[Write],
) -> dict[int, tuple[SiteRef, ...]]:
    """The sites of kernels and biases, by their first use. Biases whose view does not fit their layer are given up."""
    site_of: dict[Read | Write, int] = {}
    for i, site in enumerate(found):
        site_of |= {part: i for part in (site.read, site.write) if part is not None}
    references: dict[int, tuple[SiteRef, ...]] = {}
    # A table that is an output layer too is described by that: lookups know nothing of its rows.
    for layer in sorted(layers, key=lambda layer: not layer.kind.reads_neurons):
        writes_to = site_of[writes[layer.write]]
        refs: tuple[SiteRef, ...] = (SiteRef(writes_to, _dims(layer.batch + layer.outputs)),)
        if layer.kind.reads_neurons:
            refs = (SiteRef(site_of[reads[layer.read]], _dims(layer.batch + layer.inputs)), *refs)
        references.setdefault(layer.view.leaf, refs)
        if layer.bias is not None:
            leaf = layer.bias.view.leaf
            cut = _cut(axes[program.parameters[leaf]])
            neurons = writes[layer.write].layout.neuron_atoms
            traced = trace_view(program.parameters[leaf], layer.bias.view, axes)
            # A view that spans set axes, such as a positional table, is added per element: no bias.
            if traced is None or len(set(cut)) != len(cut) or set(cut) != set(neurons):
                layer.bias = None
            else:
                references.setdefault(leaf, (SiteRef(writes_to, tuple(map(cut.index, neurons))),))
    return references


def _dims(pairs: list[tuple[Atom, int]]) -> tuple[int, ...]:
    """Dimensions of the parameter in the canonical order of the site's neurons."""
    return tuple(dim for _, dim in sorted(pairs, key=lambda pair: pair[0].order))


def _following_read(leaf: int, cut: Axis, found: list[FoundSite], uses: Uses) -> tuple[SiteRef, ...]:
    """The site of the first read that depends on a parameter without a layer, for a scale, a shift or a table."""
    if len(set(cut)) != len(cut):
        return ()
    for i, site in enumerate(found):
        neurons = site.layout.neuron_atoms
        if site.read is None or not neurons or not set(neurons) <= set(cut):
            continue
        if uses.dependence[site.read.value].leaves >> leaf & 1:
            return (SiteRef(i, tuple(map(cut.index, neurons))),)
    return ()


def _status(leaf: int, layers: list[LayerUse], uses: Uses) -> tuple[str, str]:
    claimed_adds = {layer.bias.add for layer in layers if layer.bias is not None and layer.bias.view.leaf == leaf}
    products = {layer.equation for layer in layers if layer.view.leaf == leaf}
    refused = [layer.equation for layer in uses.layers if layer.view.leaf == leaf and layer not in layers]
    others = [equation for equation in uses.others.get(leaf, []) if equation not in claimed_adds] + refused
    names = ", ".join(sorted({equation.name for equation in others}))
    if others and (claimed_adds or products):
        return "partial", f"also used by {names} outside its layers"
    if others:
        return "unfactored", f"used by {names}, not by a linear layer"
    if not (claimed_adds or products):
        return "unused", "the loss does not depend on it"
    return "factored", ""
