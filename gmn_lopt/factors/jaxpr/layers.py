"""Linear layers of a program: equations that some kind of layer matches, their biases, and all other uses."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from gmn_lopt.factors.jaxpr.axes import Atom, Atoms, Axis, resolve, sizes
from gmn_lopt.factors.jaxpr.axis_rules import Axes, apply_rule
from gmn_lopt.factors.kinds import KINDS, LayerKind
from gmn_lopt.factors.program import Equation, Program, Scan, Value

# What changes nothing but how an array is spread over devices.
PLACEMENTS = {"pvary", "reshard", "mesh_cast", "sharding_constraint"}
# Rearrangements that leave every entry in place exactly once: a tangent is the same before and after them.
REARRANGEMENTS = PLACEMENTS | {"convert_element_type", "copy", "copy_p", "reshape", "squeeze", "transpose"}
# Rearrangements of one array: a parameter seen through them is still that parameter.
VIEWS = REARRANGEMENTS | {"broadcast_in_dim", "scan_slice", "slice"}


@dataclass(eq=False)
class View:
    """A parameter seen through a chain of rearranging equations."""

    leaf: int
    chain: tuple[Equation, ...] = ()


@dataclass(eq=False)
class BiasUse:
    """A bias added to a layer's output, after ``chain`` rearranged that output."""

    view: View
    add: Equation
    chain: tuple[Equation, ...]


@dataclass(eq=False)
class LayerUse:
    """One equation that is a layer: ``operand`` of it is a view of a parameter, the kernel.

    ``inputs``, ``outputs`` and ``batch`` (filled in by :func:`label`) say for each atom of these axes of the parameter
    which dimension of its cut shape runs over it; ``set_batch`` names the batch axes that are elements of the set, and
    ``stacked`` the loops around the layer that run over a stack of parameters (to all other loops, iterations are
    elements of the set). ``read`` and ``write`` (from :mod:`.sites`) are the indices of its activation and tangent;
    of the layers that share one, the first ``records`` the activation, or has its output ``perturbed`` for the tangent.
    """

    index: int
    equation: Equation
    kind: LayerKind
    view: View
    operand: int
    bias: BiasUse | None = None
    inputs: list[tuple[Atom, int]] = field(default_factory=list)
    outputs: list[tuple[Atom, int]] = field(default_factory=list)
    batch: list[tuple[Atom, int]] = field(default_factory=list)
    set_batch: tuple[int, ...] = ()
    stacked: tuple[Scan, ...] = ()
    read: int = -1
    write: int = -1
    records: bool = False
    perturbed: bool = False

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


@dataclass
class Dependence:
    """What a value was computed from, as bit masks over parameters and layers."""

    data: bool = False
    leaves: int = 0
    layers: int = 0


@dataclass(eq=False)
class Uses:
    """Everything that happens to the parameters, and what each value depends on."""

    layers: list[LayerUse]
    others: dict[int, list[Equation]]
    views: dict[Value, View]
    dependence: dict[Value, Dependence]


def find_layers(program: Program) -> Uses:
    """Find the layers of a program, and every use of a parameter that is not one."""
    uses = Uses([], {}, {}, {})
    for leaf, value in enumerate(program.parameters):
        uses.views[value] = View(leaf)
        uses.dependence[value] = Dependence(leaves=1 << leaf)
    for value in [*program.data, *program.constants]:
        uses.dependence[value] = Dependence(data=True)
    for equation in program.equations:
        _visit(equation, uses)
    _claim_biases(program, uses)
    return uses


def _visit(equation: Equation, uses: Uses) -> None:
    dependence = Dependence(data=equation.name == "axis_index")  # which of the devices this is
    for value in equation.inputs:
        of = uses.dependence.setdefault(value, Dependence())
        dependence.data |= of.data
        dependence.leaves |= of.leaves
        dependence.layers |= of.layers
    for value in equation.params["also"] if equation.name == "scan_enter" else ():
        dependence.data |= uses.dependence.get(value, dependence).data

    if equation.name in VIEWS and equation.inputs[0] in uses.views and equation.outputs[0].floating:
        view = uses.views[equation.inputs[0]]
        uses.views[equation.outputs[0]] = View(view.leaf, (*view.chain, equation))
    elif (layer := _as_layer(equation, uses)) is not None:
        uses.layers.append(layer)
        dependence.layers |= 1 << layer.index
    elif equation.name != "stop_gradient" and any(value.floating for value in equation.outputs):
        for value in equation.inputs:
            if value in uses.views:
                uses.others.setdefault(uses.views[value].leaf, []).append(equation)
    for value in equation.outputs:
        uses.dependence[value] = dependence


def _as_layer(equation: Equation, uses: Uses) -> LayerUse | None:
    kernels = [i for i, value in enumerate(equation.inputs) if value in uses.views]
    if not kernels or not equation.tappable:
        return None
    for found in (kind.match(equation, kernels) for kind in KINDS):
        if found is not None:
            kind, operand = found
            of = uses.dependence[equation.inputs[1 - operand]]
            # A product of parameters, such as one half of a low-rank kernel, is no activation.
            if of.data or not of.leaves:
                return LayerUse(len(uses.layers), equation, kind, uses.views[equation.inputs[operand]], operand)
    return None


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
    claimed = set()
    for layer in uses.layers:
        chain: list[Equation] = []
        value = layer.output
        for equation in follow(layer, consumers):
            others = [other for other in equation.inputs if other is not value]
            if equation.name in REARRANGEMENTS:
                chain.append(equation)
            elif len(others) == 1 and others[0] in uses.views:
                if equation not in claimed:
                    claimed.add(equation)
                    layer.bias = BiasUse(uses.views[others[0]], equation, tuple(chain))
                break
            value = equation.outputs[0]


def label(program: Program, uses: Uses, axes: dict[Value, Axes]) -> list[LayerUse]:
    """Relate each layer's axes to the dimensions of its parameter; returns the layers for which that works.

    Done after the walk, when all atoms are cut as finely as they will be. The parameter's dimensions are traced through
    the view on atoms of their own, because one space may occur twice in one parameter.
    """
    kept = []
    for layer in uses.layers:
        traced = trace_view(program.parameters[layer.view.leaf], layer.view, axes)
        if traced is None:
            continue
        kernel_axes = axes[layer.equation.inputs[layer.operand]]
        dims = layer.kind.kernel_dims(layer.equation, layer.operand)
        ok, set_batch = True, []
        for scan, sliced in traced.sliced.items():
            counter = resolve(axes[scan.index][0])
            ok &= len(counter) == len(sliced)
            layer.batch.extend(zip(counter, sliced))
        layer.stacked = tuple(traced.sliced)
        for d, (axis, behind) in enumerate(zip(kernel_axes, traced.axes)):
            atoms = resolve(axis)
            if len(atoms) != len(behind):
                ok = False
            elif None not in behind:
                for name in ("inputs", "outputs", "batch"):
                    if d in getattr(dims, name):
                        getattr(layer, name).extend(zip(atoms, behind))
            elif d in dims.batch and {*behind} == {None}:
                set_batch.append(dims.batch.index(d))  # the view broadcast it: elements of the set
            else:
                ok = False
        layer.set_batch = tuple(set_batch)
        if ok:
            kept.append(layer)
    return kept


@dataclass
class TracedView:
    """The dimensions of a leaf's cut shape that are behind the axes of a view.

    Attributes:
        axes: for each axis of the view, the dimension behind each of its atoms (None: broadcast).
        sliced: the same for the axis that each loop slices.
    """

    axes: list[list[int | None]]
    sliced: dict[Scan, list[int]]


def trace_view(leaf: Value, view: View, axes: dict[Value, Axes]) -> TracedView | None:
    """Follow the dimensions of a leaf through a view; None where they cannot be told apart, or a loop broadcasts."""
    atoms = Atoms()
    current: Axes = tuple(
        tuple(atom for size in sizes(resolve(axis)) for atom in atoms.new(size)) for axis in axes[leaf]
    )
    dims = {atom: i for i, atom in enumerate(itertools.chain(*current))}
    slices: dict[Scan, Axis] = {}
    for equation in view.chain:
        if equation.name == "scan_slice":
            slices[equation.params["scan"]] = current[0]
        (current,) = apply_rule(atoms, equation, [current])
    sliced = {scan: [dims.get(atom) for atom in resolve(axis)] for scan, axis in slices.items()}
    if any(atom.parts is not None for atom in dims) or any(None in found for found in sliced.values()):
        return None
    found = [[dims.get(atom) for atom in resolve(axis)] for axis in current]
    return TracedView(found, {scan: [d for d in part if d is not None] for scan, part in sliced.items()})
