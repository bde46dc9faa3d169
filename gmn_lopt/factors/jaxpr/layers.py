"""Linear layers of a program: equations that some kind of layer matches, and their biases."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from gmn_lopt.factors.jaxpr.axes import Atom, Atoms, Axis, resolve, sizes
from gmn_lopt.factors.jaxpr.axis_rules import Axes, apply_rule
from gmn_lopt.factors.jaxpr.weights import (
    ELEMENTWISE,
    PLACEMENTS,
    REARRANGEMENTS,
    Dependence,
    Piece,
    View,
    Weight,
    derive,
    differentiable,
    parameter,
    pieces_of,
)
from gmn_lopt.factors.kinds import KINDS, LayerKind
from gmn_lopt.factors.program import Equation, Program, Scan, Value


@dataclass(eq=False)
class BiasUse:
    """A bias added to a layer's output, after ``chain`` rearranged that output; ``operand`` of ``add`` is the bias.

    ``view`` is the parameter that is the bias of this layer, if one is.
    """

    weight: Weight
    view: View | None
    add: Equation
    operand: int
    chain: tuple[Equation, ...]


@dataclass(eq=False)
class LayerUse:
    """One equation that is a layer, or a part of one: ``operand`` of it is the kernel, of which this is ``piece``.

    ``view`` is the parameter that is this piece of the kernel; None if it is computed otherwise. Of several parameters
    whose sum it is, one is the ``first``.

    ``inputs``, ``outputs`` and ``batch`` (filled in by :func:`label`) say for each atom of these axes of the parameter
    which dimension of its cut shape runs over it; ``positions`` are the dimensions that run over a window, along each
    axis of which the layer may see them ``backwards``. ``set_batch`` names the batch axes that are elements of the set,
    and ``stacked`` the loops around the layer that run over a stack of parameters (to all other loops, iterations are
    elements of the set).
    """

    index: int
    equation: Equation
    kind: LayerKind
    operand: int
    weight: Weight
    piece: Piece
    view: View | None
    first: bool = True
    bias: BiasUse | None = None
    inputs: list[tuple[Atom, int]] = field(default_factory=list)
    outputs: list[tuple[Atom, int]] = field(default_factory=list)
    batch: list[tuple[Atom, int]] = field(default_factory=list)
    positions: tuple[int, ...] = ()
    backwards: tuple[bool, ...] = ()
    set_batch: tuple[int, ...] = ()
    stacked: tuple[Scan, ...] = ()

    @property
    def scans(self) -> tuple[Scan, ...]:
        """The loops around the layer, outermost first."""
        return self.equation.scans

    @property
    def activation(self) -> Value:
        """What the layer reads."""
        return self.equation.inputs[1 - self.operand]

    @property
    def output(self) -> Value:
        """What the layer writes."""
        return self.equation.outputs[0]

    @property
    def neuron_dims(self) -> tuple[set[int], set[int]]:
        """The dimensions of the activation and of the output that are neurons; all others are the set."""
        return self.kind.neuron_dims(self.equation, self.operand, self.set_batch)

    @property
    def is_part(self) -> bool:
        """Whether there are other pieces of the kernel."""
        return self.piece.shape != self.equation.inputs[self.operand].shape

    @property
    def regions(self) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """What this piece of the kernel reads of the activation and writes of the output, as indices."""
        regions = self.kind.regions(self.equation, self.operand, self.piece.slices) if self.is_part else None
        whole = tuple(tuple(slice(0, size) for size in value.shape) for value in (self.activation, self.output))
        return regions or (whole[0], whole[1])


@dataclass(eq=False)
class Uses:
    """The layers, the weights, what each value depends on, and the values in which the loss has a derivative."""

    layers: list[LayerUse]
    weights: dict[Value, Weight]
    dependence: dict[Value, Dependence]
    live: set[Value]
    layers_of: dict[int, int] = field(default_factory=dict)  # of each leaf, as a bit mask

    def operands(self, equation: Equation) -> list[tuple[Weight | None, Dependence]]:
        """What is known of an equation's inputs."""
        return [(self.weights.get(v), self.dependence.setdefault(v, Dependence())) for v in equation.inputs]


def find_layers(program: Program) -> Uses:
    """Find the layers of a program."""
    uses = Uses([], {}, {}, differentiable(program.equations, program.output))
    for leaf, value in enumerate(program.parameters):
        uses.weights[value] = parameter(leaf, value.shape)
        uses.dependence[value] = Dependence(leaves=1 << leaf)
    for value in program.data:
        uses.dependence[value] = Dependence(data=True, given=True)
    for value in program.constants:
        uses.dependence[value] = Dependence(data=True)
    for equation in program.equations:
        _visit(equation, uses)
    uses.layers = _without_norms(uses)
    _claim_biases(program, uses)
    return uses


def _visit(equation: Equation, uses: Uses) -> None:
    dependence = Dependence(data=equation.name == "axis_index")  # which of the devices this is
    operands = uses.operands(equation)
    for _, of in operands:
        dependence.include(of)
    for value in equation.params["also"] if equation.name == "scan_enter" else ():
        of = uses.dependence.get(value, Dependence())
        dependence.data |= of.data
        dependence.given |= of.given
    if equation.name == "stop_gradient":
        dependence.data, dependence.given, dependence.leaves = True, True, 0

    if layers := _as_layers(equation, uses):
        for layer in layers:
            dependence.layers |= 1 << layer.index
            if layer.view is not None:
                uses.layers_of[layer.view.leaf] = uses.layers_of.get(layer.view.leaf, 0) | 1 << layer.index
        uses.layers += layers
    elif (weight := derive(equation, operands, uses.layers_of)) is not None:
        uses.weights.update((value, weight) for value in equation.outputs if value.floating)
    for value in equation.outputs:
        uses.dependence[value] = dependence


def _as_layers(equation: Equation, uses: Uses) -> list[LayerUse]:
    """The layer that an equation is, cut into the pieces of its kernel."""
    weights = {i: uses.weights[v] for i, v in enumerate(equation.inputs) if v in uses.weights}
    raw = [i for i, weight in weights.items() if weight.raw]
    kernels = raw or [i for i, weight in weights.items() if weight.whole]
    if not kernels or not equation.tappable or equation.outputs[0] not in uses.live:
        return []
    for kind, operand in filter(None, (kind.match(equation, kernels) for kind in KINDS)):
        of = uses.dependence[equation.inputs[1 - operand]]
        # A product of weights, such as a low-rank kernel, is a weight: its operands are no activations.
        if not of.data and of.leaves and not of.layers:
            continue
        weight, shape = weights[operand], equation.inputs[operand].shape
        pieces = pieces_of(weight, shape)
        if pieces[0].shape != shape and kind.regions(equation, operand, pieces[0].slices) is None:
            pieces = (Piece((0,) * len(shape), shape),)
        found = [(piece, view, i == 0) for piece in pieces for i, view in enumerate(piece.views or (None,))]
        start = len(uses.layers)
        return [LayerUse(start + i, equation, kind, operand, weight, *x) for i, x in enumerate(found)]
    return []


def _without_norms(uses: Uses) -> list[LayerUse]:
    """Drop the products by which a norm of a kernel is found: they are steps towards that kernel, not layers."""
    steps = 0
    for layer in uses.layers:
        if not layer.weight.raw:
            within = uses.dependence[layer.equation.inputs[layer.operand]].layers
            for view in layer.weight.views:
                steps |= within & uses.layers_of.get(view.leaf, 0)
    return [layer for layer in uses.layers if not steps >> layer.index & 1]


def follow(layer: LayerUse, consumers: dict[Value, list[Equation]]) -> Iterator[Equation]:
    """The equations after a layer through which its tangent passes unchanged: rearrangements and additions."""
    value = layer.output
    while len(consumers.get(value, ())) == 1:
        (equation,) = consumers[value]
        same_shape_add = equation.name in ("add", "add_any") and value.shape == equation.outputs[0].shape
        if not equation.tappable or not (same_shape_add or equation.name in REARRANGEMENTS):
            return
        if not equation.outputs[0].floating or equation.scans != layer.scans:
            return
        yield equation
        value = equation.outputs[0]


def _claim_biases(program: Program, uses: Uses) -> None:
    consumers = program.consumers()
    claimed: dict[Equation, list[LayerUse]] = {}
    for layer in (layer for layer in uses.layers if layer.first):
        chain: list[Equation] = []
        value = layer.output
        for equation in follow(layer, consumers):
            others = [other for other in equation.inputs if other is not value]
            if equation.name in REARRANGEMENTS:
                chain.append(equation)
            elif len(others) == 1 and others[0] in uses.weights:
                # The pieces of one layer share its bias, each its own part of it.
                before = claimed.setdefault(equation, [])
                alone = all(x.equation is layer.equation and x.regions[1] != layer.regions[1] for x in before)
                bias = _bias(layer, uses.weights[others[0]], others[0], equation, tuple(chain))
                if alone and bias is not None:
                    before.append(layer)
                    layer.bias = bias
                break
            value = equation.outputs[0]


def _bias(layer: LayerUse, weight: Weight, value: Value, add: Equation, chain: tuple[Equation, ...]) -> BiasUse | None:
    pieces = weight.pieces
    if layer.is_part:
        parts = {(x.start, x.shape) for x in layer.weight.pieces}
        kernel = layer.equation.inputs[layer.operand].shape
        if chain or sum(math.prod(shape) for _, shape in parts) != math.prod(kernel):
            return None
        region = [part if size != 1 else slice(0, 1) for part, size in zip(layer.regions[1], value.shape)]
        pieces = tuple(piece for piece in pieces if list(piece.slices) == region)
    views = [view for piece in pieces for view in piece.views]
    if not views and any(size != 1 and d not in layer.neuron_dims[1] for d, size in enumerate(value.shape)):
        return None
    return BiasUse(weight, views[0] if len(views) == 1 else None, add, add.operand(value), chain)


def label(program: Program, uses: Uses, axes: dict[Value, Axes], atoms: Atoms) -> list[LayerUse]:
    """Relate each layer's axes to the dimensions of its parameter; returns the layers for which that works.

    Done after the walk, when all atoms are cut as finely as they will be. The parameter's dimensions are traced through
    the view on atoms of their own, because one space may occur twice in one parameter. A kernel that no parameter can
    be traced to remains a layer, without a parameter, if nothing in it is broadcast.
    """
    return [
        layer
        for layer in uses.layers
        if (layer.view is not None and _label(layer, program, axes, atoms)) or _give_up(layer)
    ]


def _give_up(layer: LayerUse) -> bool:
    layer.view, layer.stacked, layer.set_batch = None, (), ()
    layer.inputs, layer.outputs, layer.batch = [], [], []
    layer.positions, layer.backwards = (), ()
    return layer.weight.whole


def part_of(axes: Axes, region: tuple[slice, ...], shape: tuple[int, ...], atoms: Atoms) -> Axes:
    """The axes of a block of an array."""
    return tuple(atoms.block(axis, size, s.start, s.stop) for axis, size, s in zip(axes, shape, region))


def _label(layer: LayerUse, program: Program, axes: dict[Value, Axes], atoms: Atoms) -> bool:
    assert layer.view is not None
    traced = trace_view(program.parameters[layer.view.leaf], layer.view, axes)
    if traced is None:
        return False
    kernel = layer.equation.inputs[layer.operand]
    kernel_axes = part_of(axes[kernel], layer.piece.slices, kernel.shape, atoms)
    dims = layer.kind.kernel_dims(layer.equation, layer.operand)
    set_batch = []
    for scan, sliced in traced.sliced.items():
        counter = resolve(axes[scan.index][0])
        if len(counter) != len(sliced):
            return False
        layer.batch.extend(zip(counter, sliced))
    layer.stacked = tuple(traced.sliced)
    for d, (axis, behind) in enumerate(zip(kernel_axes, traced.axes)):
        found = resolve(axis)
        if d not in (*dims.inputs, *dims.outputs, *dims.batch):
            continue  # positions belong to no neurons
        if sizes(found) != behind.sizes or not traced.reversed.isdisjoint(behind.dims):
            return False
        if None not in behind.dims:
            pairs = [(atom, dim) for atom, dim in zip(found, behind.dims) if dim is not None]
            groups = _leading(found, dims.groups) if d in dims.outputs else 0
            if groups is None:
                return False
            layer.batch.extend(pairs if d in dims.batch else pairs[:groups])
            for name in ("inputs", "outputs"):
                if d in getattr(dims, name):
                    getattr(layer, name).extend(pairs[groups:])
        elif d in dims.batch and {*behind.dims} == {None}:
            set_batch.append(dims.batch.index(d))  # the view broadcast it: elements of the set
        else:
            return False
    layer.set_batch = tuple(set_batch)
    layer.positions = tuple(d for at in dims.positions for d in traced.axes[at].dims if d is not None)
    layer.backwards = tuple(not traced.reversed.isdisjoint(traced.axes[at].dims) for at in dims.positions)
    return True


def _leading(atoms: Axis, groups: int) -> int | None:
    """How many of the first atoms make up the groups; None where they are cut otherwise."""
    counts = [math.prod(sizes(atoms[:i])) for i in range(len(atoms) + 1)]
    return counts.index(groups) if groups in counts else None


@dataclass
class Behind:
    """The dimensions of a leaf's cut shape that are behind the atoms of an axis (None: broadcast), and their sizes."""

    dims: list[int | None]
    sizes: tuple[int, ...]


@dataclass
class TracedView:
    """The dimensions of a leaf's cut shape that are behind the axes of a view.

    Attributes:
        axes: for each axis of the view.
        sliced: for the axis that each loop slices.
        reversed: the dimensions that are seen backwards.
    """

    axes: list[Behind]
    sliced: dict[Scan, list[int]]
    reversed: frozenset[int] = frozenset()


def trace_view(leaf: Value, view: View, axes: dict[Value, Axes]) -> TracedView | None:
    """Follow the dimensions of a leaf through a view; None where they cannot be told apart, or a loop broadcasts."""
    atoms = Atoms()
    current: Axes = tuple(
        tuple(atom for size in sizes(resolve(axis)) for atom in atoms.new(size)) for axis in axes[leaf]
    )
    dims = {atom: i for i, atom in enumerate(itertools.chain(*current))}
    slices: dict[Scan, Axis] = {}
    backwards: set[Atom] = set()
    placed = False
    for equation in view.chain:
        placed |= equation.name in PLACEMENTS
        if equation.name == "rev":
            backwards ^= {atom for d in equation.params["dimensions"] for atom in resolve(current[d])}
        if equation.name == "scan_slice":
            slices[equation.params["scan"]] = current[0]
        if equation.name in PLACEMENTS or equation.name in ELEMENTWISE:
            continue
        if placed and equation.name in ("reshape", "squeeze"):  # of a piece: axes of size 1 come and go
            rest = iter(axis for axis, size in zip(current, equation.inputs[0].shape) if size != 1)
            current = tuple(() if size == 1 else next(rest) for size in equation.outputs[0].shape)
        else:
            (current,) = apply_rule(atoms, equation, [current])
    sliced = {scan: [dims.get(atom) for atom in resolve(axis)] for scan, axis in slices.items()}
    if any(atom.parts is not None for atom in dims) or any(None in found for found in sliced.values()):
        return None
    found = [Behind([dims.get(atom) for atom in resolve(axis)], sizes(resolve(axis))) for axis in current]
    turned = frozenset(dims[atom] for atom in backwards if atom in dims)
    return TracedView(found, {scan: [d for d in part if d is not None] for scan, part in sliced.items()}, turned)
