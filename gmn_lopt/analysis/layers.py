"""Linear layers of a program: products with a view of a parameter, their biases, and all other uses of parameters."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from gmn_lopt.analysis.axes import Atom, Atoms, Axis, resolve, sizes
from gmn_lopt.analysis.axis_rules import Axes, apply_rule
from gmn_lopt.analysis.program import Equation, Program, Value

# Rearrangements of one array: a parameter seen through them is still that parameter.
VIEWS = {"broadcast_in_dim", "convert_element_type", "copy", "copy_p", "reshape", "slice", "squeeze", "transpose"}
# Rearrangements that leave every entry in place exactly once: a tangent is the same before and after them.
REARRANGEMENTS = {"convert_element_type", "copy", "copy_p", "reshape", "squeeze", "transpose"}


@dataclass(eq=False)
class View:
    """A parameter seen through a chain of rearranging equations."""

    leaf: int
    chain: tuple[Equation, ...] = ()


@dataclass(eq=False)
class BiasUse:
    """A bias added to a layer's output, after ``chain`` rearranged that output."""

    view: View
    value: Value
    add: Equation
    chain: tuple[Equation, ...]


@dataclass(eq=False)
class LayerUse:
    """One product of an activation with a view of a parameter.

    ``inputs``, ``outputs`` and ``batch`` (filled in by :func:`label`) say for each atom of these axes of the parameter
    which dimension of its cut shape runs over it; ``set_batch`` names the batch axes that are elements of the set.
    """

    index: int
    equation: Equation
    view: View
    side: int
    bias: BiasUse | None = None
    inputs: list[tuple[Atom, int]] = field(default_factory=list)
    outputs: list[tuple[Atom, int]] = field(default_factory=list)
    batch: list[tuple[Atom, int]] = field(default_factory=list)
    set_batch: tuple[int, ...] = ()

    @property
    def activation(self) -> Value:
        """The input of the layer."""
        return self.equation.inputs[1 - self.side]

    @property
    def output(self) -> Value:
        """The product."""
        return self.equation.outputs[0]


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
    dependence = Dependence()
    for value in equation.inputs:
        of = uses.dependence.setdefault(value, Dependence())
        dependence.data |= of.data
        dependence.leaves |= of.leaves
        dependence.layers |= of.layers

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
    if equation.name != "dot_general" or not equation.tappable:
        return None
    sides = [side for side in (0, 1) if equation.inputs[side] in uses.views]
    if len(sides) != 1:
        return None
    of = uses.dependence[equation.inputs[1 - sides[0]]]
    if of.leaves and not of.data:  # a product of parameters, such as one half of a low-rank kernel, is no activation
        return None
    return LayerUse(len(uses.layers), equation, uses.views[equation.inputs[sides[0]]], sides[0])


def follow(value: Value, consumers: dict[Value, list[Equation]]) -> Iterator[Equation]:
    """The equations after ``value`` through which its tangent passes unchanged: rearrangements and additions."""
    while len(consumers.get(value, ())) == 1:
        (equation,) = consumers[value]
        same_shape_add = equation.name in ("add", "add_any") and value.shape == equation.outputs[0].shape
        if not equation.tappable or not (same_shape_add or equation.name in REARRANGEMENTS):
            return
        if not equation.outputs[0].floating:
            return
        yield equation
        value = equation.outputs[0]


def _claim_biases(program: Program, uses: Uses) -> None:
    consumers = program.consumers()
    claimed = set()
    for layer in uses.layers:
        chain: list[Equation] = []
        value = layer.output
        for equation in follow(value, consumers):
            if equation.name in REARRANGEMENTS:
                chain.append(equation)
                value = equation.outputs[0]
                continue
            others = [other for other in equation.inputs if other is not value]
            if len(others) == 1 and others[0] in uses.views and equation not in claimed:
                claimed.add(equation)
                layer.bias = BiasUse(uses.views[others[0]], others[0], equation, tuple(chain))
            break


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
        operand = axes[layer.equation.inputs[layer.side]]
        numbers = layer.equation.params["dimension_numbers"]
        contract, batch = numbers[0][layer.side], numbers[1][layer.side]
        ok, set_batch = True, []
        for d, (axis, dims) in enumerate(zip(operand, traced)):
            pairs = list(zip(resolve(axis), dims))
            if len(resolve(axis)) != len(dims):
                ok = False
            elif any(dim is None for dim in dims):
                # An axis that the view broadcast: elements of the set if the layer batches over it.
                if d in batch and all(dim is None for dim in dims):
                    set_batch.append(batch.index(d))
                else:
                    ok = False
            else:
                target = layer.inputs if d in contract else layer.batch if d in batch else layer.outputs
                target.extend((atom, dim) for atom, dim in pairs if dim is not None)
        layer.set_batch = tuple(set_batch)
        if ok:
            kept.append(layer)
    return kept


def trace_view(leaf: Value, view: View, axes: dict[Value, Axes]) -> list[list[int | None]] | None:
    """For each axis of a view, the dimension of the leaf's cut shape behind each of its atoms (None: broadcast)."""
    atoms = Atoms()
    cut = [sizes(resolve(axis)) for axis in axes[leaf]]
    dims: dict[Atom, int] = {}
    leaf_axes: list[Axis] = []
    for axis_sizes in cut:
        axis = tuple(atom for size in axis_sizes for atom in atoms.new(size))
        for atom in axis:
            dims[atom] = len(dims)
        leaf_axes.append(axis)
    current: Axes = tuple(leaf_axes)
    for equation in view.chain:
        (current,) = apply_rule(atoms, equation, [current])
    if any(atom.parts is not None for atom in dims):
        return None
    return [[dims.get(atom) for atom in resolve(axis)] for axis in current]
