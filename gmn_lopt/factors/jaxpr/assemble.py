"""From a program to its :class:`gmn_lopt.GradientStructure`, and to the taps that yield its factors."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array

from gmn_lopt.factors.jaxpr.axes import Atom, Atoms, Axis, fix_sum, resolve
from gmn_lopt.factors.jaxpr.axis_rules import Axes, apply_rule
from gmn_lopt.factors.jaxpr.layers import LayerUse, Uses, find_layers, label, trace_view
from gmn_lopt.factors.jaxpr.reconstruct import kernel_gradients
from gmn_lopt.factors.jaxpr.replay import Replay, Tap
from gmn_lopt.factors.jaxpr.sites import (
    Factor,
    FoundSite,
    Kernel,
    Layouts,
    find_reads,
    find_writes,
    join,
    pair,
    without_batch,
)
from gmn_lopt.factors.jaxpr.stacks import copies, independent_stacks
from gmn_lopt.factors.jaxpr.status import statuses
from gmn_lopt.factors.program import Path, Program, Value, flatten
from gmn_lopt.factors.spaces import Parameter, Site, SiteRef, Space
from gmn_lopt.factors.structure import Derived, GradientStructure, Layer


@dataclass(frozen=True)
class Traced:
    """A structure, with what it takes to compute factors from the jaxpr that it was found in."""

    structure: GradientStructure
    closed: ClosedJaxpr
    taps: dict[Path, Tap]
    perturbed: dict[Path, tuple[Any, tuple[int, ...]]]  # JAX's type of an output, and its shape with the loops around
    reads: list[Factor]
    writes: list[Factor]
    without_batch: tuple[int, ...]


def walk(program: Program, atoms: Atoms) -> dict[Value, Axes]:
    """The axes of every value of a program."""
    axes: dict[Value, Axes] = {value: atoms.new_axes(value.shape) for value in program.parameters}
    for value in [*program.data, *program.constants]:
        axes[value] = atoms.new_axes(value.shape, fixed=True)
    for equation in program.equations:
        inputs = [axes.setdefault(value, ()) for value in equation.inputs]
        axes.update(zip(equation.outputs, apply_rule(atoms, equation, inputs)))
    for value in program.parameters:
        # Of a direct sum only products can be said to lie in a parameter: its parts stay where they are.
        for atom in _cut(axes[value]):
            fix_sum(atom)
    return axes


def assemble(
    closed: ClosedJaxpr, names: Sequence[str], dtypes: Sequence[str], treedef: jax.tree_util.PyTreeDef
) -> Traced:
    """Analyse a loss given as a jaxpr: parameters first among its inputs, the loss first among its outputs."""
    program = flatten(closed, len(names))
    atoms = Atoms()
    axes = walk(program, atoms)
    uses = find_layers(program)
    layouts = Layouts(axes, atoms)
    layers = label(program, uses, axes, atoms)
    kernels = join(layers, layouts)
    reads = find_reads(kernels, layouts)
    writes = find_writes(program, kernels, layouts)
    for factor in (*reads, *writes):
        for atom in factor.neuron_atoms:
            fix_sum(atom)
    found = pair(reads, writes, uses)
    references = _references(program, axes, kernels, found, reads, writes)
    stacks = independent_stacks(program, axes)
    space, set_axis = _Numbering(), _Numbering()
    sites = tuple(
        Site(
            spaces=tuple(map(space, site.factor.neuron_atoms)),
            size=site.factor.shape[1],
            set_size=site.factor.shape[0],
            set_axes=tuple(map(set_axis, site.factor.set_atoms)),
            activation=None if site.read is None else reads.index(site.read),
            tangent=None if site.write is None else writes.index(site.write),
            copies=copies(site.factor.neuron_atoms, program, axes, stacks),
        )
        for site in found
    )
    parameters = []
    for leaf, (value, (status, reason)) in enumerate(zip(program.parameters, statuses(program, uses, layers))):
        cut = _cut(axes[value])
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
                positions=next((x.positions for x in layers if x.view is not None and x.view.leaf == leaf), ()),
            )
        )
    structure = GradientStructure(
        spaces=tuple(
            Space(atom.size, not atom.fixed, tuple(space(s) for s in stacks.get(atom, ()) if s in space.atoms))
            for atom in space.atoms
        ),
        sites=sites,
        parameters=tuple(parameters),
        layers=tuple(_layer(program, kernel, uses, layouts, reads, writes) for kernel in kernels),
        treedef=treedef,
        activation_shapes=tuple(read.shape for read in reads),
        tangent_shapes=tuple(write.shape for write in writes),
        derived=_derived(closed, layers, uses, len(names)),
    )
    records = {path for read in reads for path, _ in read.parts}
    perturbs = {path for write in writes for path, _ in write.parts}
    taps, perturbed = {}, {}
    for layer in layers:
        path = layer.equation.path
        record = (path, 1 - layer.operand, partial(layer.kind.record, layer.equation))
        taps[path] = Tap((record,) if path in records else (), path in perturbs)
        if path in perturbs:
            shape = (*(scan.length for scan in layer.scans), *layer.output.shape)
            perturbed[path] = layer.output.aval, shape
    return Traced(structure, closed, taps, perturbed, reads, writes, without_batch(kernels, reads, writes, found, uses))


def _layer(
    program: Program, kernel: Kernel, uses: Uses, layouts: Layouts, reads: list[Factor], writes: list[Factor]
) -> Layer:
    layer, leaves = kernel.layers[0], 0
    for use in kernel.layers:
        leaves |= uses.dependence[use.equation.inputs[use.operand]].leaves
    # A bias that is computed, and no parameter, has no leaf.
    found = [use.bias.view for use in kernel.layers if use.bias is not None]
    biases = {None if view is None else view.leaf for view in found}
    bias = biases.pop() if len(biases) == 1 else None
    ends = np.cumsum([layout.canonical_shape[0] for _, layout in writes[kernel.write].parts]).tolist()
    spans = zip(kernel.layers, [0, *ends], ends)
    return Layer(
        kind=layouts.kind(layer),
        kernel=None if layer.view is None else layer.view.leaf,
        bias=bias,
        activation=kernel.read,
        tangent=kernel.write,
        leaves=tuple(leaf for leaf in range(len(program.parameters)) if leaves >> leaf & 1),
        direct=layer.view is not None and all(use.weight.raw for use in kernel.layers),
        unbiased=() if bias is None else tuple((a, b) for use, a, b in spans if use.bias is None),
        gradients=kernel_gradients(program, kernel, reads[kernel.read], writes[kernel.write]),
    )


def _derived(closed: ClosedJaxpr, layers: Sequence[LayerUse], uses: Uses, num_parameters: int) -> Derived | None:
    """How kernels and biases are computed that are not simply parameters; None if there are none."""
    records: dict[Path, dict[Hashable, int]] = {}
    constant = True
    for layer in layers:
        used = [(layer.equation.path, layer.operand, layer.weight, layer.view)]
        if layer.bias is not None:
            used.append((layer.bias.add.path, layer.bias.operand, layer.bias.weight, layer.bias.view))
        for path, operand, weight, view in used:
            if not weight.raw or view is None:
                records.setdefault(path, {})[path, operand] = operand
                constant &= weight.constant
    if not records:
        return None
    same = lambda x: x  # noqa: E731
    taps = {path: Tap(tuple((key, operand, same) for key, operand in of.items())) for path, of in records.items()}

    def compute(leaves: list[Array], others: list[Array]) -> dict[Hashable, Array]:
        run = Replay(taps, {})
        run.jaxpr(closed.jaxpr, closed.consts, [*leaves, *others], ())
        return run.recorded

    avals = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in closed.in_avals]
    return Derived(compute, constant, tuple(avals[:num_parameters]), tuple(avals[num_parameters:]))


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
    kernels: list[Kernel],
    found: list[FoundSite],
    reads: list[Factor],
    writes: list[Factor],
) -> dict[int, tuple[SiteRef, ...]]:
    """The sites of kernels and biases, by their first use. Biases whose view does not fit their layer are given up."""
    site_of: dict[Factor, int] = {}
    for i, site in enumerate(found):
        site_of |= {part: i for part in (site.read, site.write) if part is not None}
    references: dict[int, tuple[SiteRef, ...]] = {}
    # A table that is an output layer too is described by that: lookups know nothing of its rows.
    for kernel in sorted(kernels, key=lambda kernel: not kernel.layers[0].kind.reads_neurons):
        layer, write = kernel.layers[0], writes[kernel.write]
        writes_to = site_of[write]
        if layer.view is not None:
            refs: tuple[SiteRef, ...] = (SiteRef(writes_to, _dims(layer.batch + layer.outputs)),)
            if layer.kind.reads_neurons:
                refs = (SiteRef(site_of[reads[kernel.read]], _dims(layer.batch + layer.inputs)), *refs)
            references.setdefault(layer.view.leaf, refs)
        for use in kernel.layers:
            if use.bias is None or use.bias.view is None:
                continue
            leaf = use.bias.view.leaf
            cut = _cut(axes[program.parameters[leaf]])
            neurons = write.neuron_atoms
            traced = trace_view(program.parameters[leaf], use.bias.view, axes)
            # A view that spans set axes, such as a positional table, is added per element: no bias.
            if traced is None or traced.reversed or len(set(cut)) != len(cut) or set(cut) != set(neurons):
                use.bias = None
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
        neurons = site.factor.neuron_atoms
        if site.read is None or not neurons or not set(neurons) <= set(cut):
            continue
        if any(uses.dependence[layer.activation].leaves >> leaf & 1 for layer in site.read.layers):
            return (SiteRef(i, tuple(map(cut.index, neurons))),)
    return ()
