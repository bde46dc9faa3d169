"""Which parameters' gradients the factors give, and what is in the way of the others, in a reader's words."""

from collections.abc import Sequence

from gmn_lopt.factors.jaxpr.layers import LayerUse, Uses
from gmn_lopt.factors.jaxpr.weights import SUMS
from gmn_lopt.factors.program import Equation, Program, Value

# A use of a parameter: an equation, and which of its operands.
Edge = tuple[Equation, int]


def covered(uses: Uses, layers: Sequence[LayerUse]) -> set[Edge]:
    """The uses whose part of the gradient the factors give: kernels of which every piece is a layer, and biases."""
    lost = {layer.equation for layer in uses.layers} & {x.equation for x in uses.layers if x not in layers}
    edges = {(layer.equation, layer.operand) for layer in layers if layer.equation not in lost}
    biases = (layer.bias for layer in layers if layer.equation not in lost and layer.bias is not None)
    return edges | {(bias.add, bias.operand) for bias in biases}


def statuses(program: Program, uses: Uses, layers: Sequence[LayerUse]) -> list[tuple[str, str]]:
    """For each parameter its status and the reason for it (:class:`gmn_lopt.factors.spaces.Parameter`).

    A parameter is factored if each path by which its gradient flows leads through a kernel or a bias.
    """
    edges = covered(uses, layers)
    escaping = {program.output}
    reasons: dict[Value, list[str]] = {}
    for equation in reversed(program.equations):
        escapes = any(value in escaping for value in equation.outputs)
        if equation.name == "stop_gradient" or not escapes:
            continue
        weight = any(value in uses.weights for value in equation.outputs)
        behind = [r for value in equation.outputs for r in reasons.get(value, [])] if weight else []
        for operand, value in enumerate(equation.inputs):
            if value.floating and (equation, operand) not in edges:
                escaping.add(value)
                if value in uses.weights:
                    reasons.setdefault(value, []).extend(behind or [_reason(equation, value)])
    known = uses.dependence.get(program.output)
    used = 0 if known is None else known.leaves
    found = []
    for leaf, value in enumerate(program.parameters):
        has_factors = any(_reaches(uses, edge, leaf) for edge in edges)
        if value not in uses.live or not used >> leaf & 1:
            found.append(("unused", "the loss does not depend on it"))
        elif value not in escaping:
            found.append(("factored", ""))
        else:
            why = "; ".join(dict.fromkeys(reasons.get(value, ["used otherwise"])))
            found.append(("partial", f"also {why}") if has_factors else ("unfactored", why))
    return found


def _reaches(uses: Uses, edge: Edge, leaf: int) -> bool:
    equation, operand = edge
    return bool(uses.dependence[equation.inputs[operand]].leaves >> leaf & 1)


PENALTY = "in a term of the loss that depends on parameters only, such as a penalty"


def _reason(equation: Equation, value: Value) -> str:
    """Why a use of a weight is no layer."""
    if not equation.tappable:
        return f"used by {equation.name} inside a function with a derivative of its own, where there are no factors"
    if equation.name in SUMS and equation.name != "select_n":
        return PENALTY if value.shape == () else "a shift: added to what no layer has just written"
    if equation.name == "mul" or (equation.name == "div" and equation.inputs[0] is value):
        return "a scale: multiplied with activations"
    if equation.name == "while":
        return "used inside of while, where there are no factors"
    return f"used by {equation.name}, not by a linear layer"
