"""Stacks of layers that a loop runs over: which neurons each layer has to itself, and which all of them share."""

from gmn_lopt.factors.jaxpr.axes import Atom, Axis, resolve
from gmn_lopt.factors.jaxpr.axis_rules import Axes
from gmn_lopt.factors.jaxpr.weights import VIEWS
from gmn_lopt.factors.program import Equation, Program, Scan, Value


def independent_stacks(program: Program, axes: dict[Value, Axes]) -> dict[Atom, Axis]:
    """For each atom the scanned axes at each of whose positions it stands for other neurons.

    Those are the neurons of which nothing outside of the loop's body knows, its carries included, but parameters that
    are stacked along the scanned axis and used for nothing but being sliced by the loop. They may be permuted
    differently in every iteration; all others are the same neurons in all iterations.
    """
    inside: dict[Scan, set[Value]] = {}
    for equation in program.equations:
        if equation.name == "scan_slice":
            inside.setdefault(equation.params["scan"], set())
    for equation in program.equations:
        for scan in equation.scans:
            inside.setdefault(scan, set()).update(equation.outputs)
    consumers = program.consumers()
    result: dict[Atom, Axis] = {}
    for scan, values in inside.items():
        counter = set(resolve(axes[scan.index][0]))
        within, without = set(), set()
        for value, value_axes in axes.items():
            atoms = {atom for axis in value_axes for atom in resolve(axis)}
            if value in values:
                within |= atoms
            elif not (counter <= atoms and _only_sliced(consumers.get(value, []), scan)):
                without |= atoms
        for atom in within - without - counter:
            result[atom] = (*result.get(atom, ()), *sorted(counter, key=lambda atom: atom.order))
    return result


def _only_sliced(consumers: list[Equation], scan: Scan) -> bool:
    return all(
        # Layers that come in another order are not at the positions of the scanned axis.
        equation.params["scan"] is scan if equation.name == "scan_slice" else equation.name in VIEWS - {"rev"}
        for equation in consumers
    )


def copies(neurons: Axis, program: Program, axes: dict[Value, Axes], stacks: dict[Atom, Axis]) -> tuple[int, ...]:
    """The positions among a site's atoms of scanned axes along which its other neurons are the same."""
    counters = {
        atom
        for equation in program.equations
        if equation.name == "scan_index"
        for atom in resolve(axes[equation.outputs[0]][0])
    }
    found = []
    for i, atom in enumerate(neurons):
        others = [other for other in neurons if other not in counters]
        if atom in counters and others and not any(atom in stacks.get(other, ()) for other in others):
            found.append(i)
    return tuple(found)
