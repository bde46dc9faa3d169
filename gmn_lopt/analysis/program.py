"""The loss as a flat list of equations: its jaxpr with every call entered and dead equations dropped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive

Path = tuple[int, ...]


@dataclass(eq=False)
class Value:
    """An array in the program.

    Attributes:
        shape: its shape.
        origin: ``"parameter"``, ``"data"`` (arguments and captured arrays), ``"literal"`` (a scalar constant) or
            ``"equation"``.
        dtype: its dtype, None for what has none.
    """

    shape: tuple[int, ...]
    origin: str
    dtype: Any

    @property
    def floating(self) -> bool:
        """Whether gradients can flow through it."""
        return self.dtype is not None and jnp.issubdtype(self.dtype, jnp.inexact)


@dataclass(eq=False)
class Equation:
    """One primitive application; ``path`` locates it in the nested jaxprs.

    ``tappable`` is false inside functions with custom derivatives, where a perturbation of an intermediate value would
    not get the derivative that the function defines.
    """

    primitive: Primitive
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    path: Path
    tappable: bool

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name


@dataclass(eq=False)
class Program:
    """A flat program with one scalar output."""

    parameters: list[Value]
    data: list[Value]
    equations: list[Equation]
    output: Value
    constants: list[Value] = field(default_factory=list)

    def consumers(self) -> dict[Value, list[Equation]]:
        """The equations that read each value, once for each time they read it; the output is read by nobody."""
        result: dict[Value, list[Equation]] = {}
        for equation in self.equations:
            for value in equation.inputs:
                result.setdefault(value, []).append(equation)
        return result


def _closed(name: str) -> Callable[[dict[str, Any]], tuple[Jaxpr, Sequence[Any]]]:
    def body(params: dict[str, Any]) -> tuple[Jaxpr, Sequence[Any]]:
        jaxpr = params[name]
        return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())

    return body


@dataclass(frozen=True)
class Call:
    """How to enter a primitive that calls a jaxpr, and whether its inside may be tapped."""

    body: Callable[[dict[str, Any]], tuple[Jaxpr, Sequence[Any]]]
    tappable: bool


CALLS: dict[str, Call] = {
    "jit": Call(_closed("jaxpr"), True),
    "pjit": Call(_closed("jaxpr"), True),
    "closed_call": Call(_closed("call_jaxpr"), True),
    "remat2": Call(_closed("jaxpr"), True),
    "checkpoint": Call(_closed("jaxpr"), True),
    "custom_jvp_call": Call(_closed("call_jaxpr"), False),
    "custom_vjp_call": Call(_closed("call_jaxpr"), False),
}


def flatten(closed: ClosedJaxpr, num_parameters: int) -> Program:
    """Inline a closed jaxpr whose first inputs are the parameters and whose first output is the loss."""
    flat = _Flattener()
    invars = closed.jaxpr.invars
    parameters = [_value(var, "parameter") for var in invars[:num_parameters]]
    data = [_value(var, "data") for var in invars[num_parameters:]]
    outputs = flat.inline(closed.jaxpr, flat.constants_of(closed.jaxpr), [*parameters, *data], (), True)
    equations = _live(flat.equations, outputs[0])
    return Program(parameters, data, equations, outputs[0], flat.constants)


class _Flattener:
    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self.constants: list[Value] = []

    def constants_of(self, jaxpr: Jaxpr) -> list[Value]:
        values = [_value(var, "data") for var in jaxpr.constvars]
        self.constants.extend(values)
        return values

    def inline(
        self, jaxpr: Jaxpr, constants: list[Value], arguments: list[Value], path: Path, tappable: bool
    ) -> list[Value]:
        environment: dict[Any, Value] = dict(zip(jaxpr.constvars, constants)) | dict(zip(jaxpr.invars, arguments))

        def read(atom: Any) -> Value:
            if not isinstance(atom, Literal):
                return environment[atom]
            value = _value(atom, "literal" if np.ndim(atom.val) == 0 else "data")
            if value.shape:
                self.constants.append(value)
            return value

        for index, eqn in enumerate(jaxpr.eqns):
            inputs = [read(atom) for atom in eqn.invars]
            call = CALLS.get(eqn.primitive.name)
            if call is not None:
                inner, _ = call.body(eqn.params)
                outputs = self.inline(
                    inner, self.constants_of(inner), inputs, (*path, index), tappable and call.tappable
                )
            else:
                outputs = [_value(var, "equation") for var in eqn.outvars]
                equation = Equation(eqn.primitive, eqn.params, inputs, outputs, (*path, index), tappable)
                self.equations.append(equation)
            environment.update(zip(eqn.outvars, outputs))
        return [read(atom) for atom in jaxpr.outvars]


def _value(var: Any, origin: str) -> Value:
    return Value(tuple(getattr(var.aval, "shape", ())), origin, getattr(var.aval, "dtype", None))


def _live(equations: list[Equation], output: Value) -> list[Equation]:
    needed = {output}
    kept = []
    for equation in reversed(equations):
        if any(value in needed for value in equation.outputs):
            needed.update(equation.inputs)
            kept.append(equation)
    return kept[::-1]
