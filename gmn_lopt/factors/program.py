"""The loss as a flat list of equations: its jaxpr with every call entered and dead equations dropped.

All branches of a ``cond`` are entered, one after the other; ``cond_exit`` picks the results of one of them. What has an
equation for several arrays (``split``, ``optimization_barrier``) has one for each of them here.

The body of a ``scan`` is entered once, its values standing for one iteration; four equations of our own connect it with
the outside: ``scan_index`` makes the iteration counter, whose axis is the scanned axis; ``scan_enter`` makes the carry
that an iteration starts with, ``scan_slice`` takes the iteration's slice of a scanned array, and ``scan_exit`` returns
the last carry and stacks the outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jaxtyping import Array

Path = tuple[int, ...]


@dataclass(eq=False)
class Value:
    """An array in the program.

    Attributes:
        shape: its shape.
        origin: ``"parameter"``, ``"data"`` (arguments and captured arrays), ``"literal"`` (a scalar constant) or
            ``"equation"``.
        dtype: its dtype, None for what has none.
        aval: JAX's type of it, which also says how it is spread over devices; None for values of our own.
    """

    shape: tuple[int, ...]
    origin: str
    dtype: Any
    aval: Any = None

    @property
    def floating(self) -> bool:
        """Whether gradients can flow through it."""
        return self.dtype is not None and jnp.issubdtype(self.dtype, jnp.inexact)


@dataclass(eq=False)
class Scan:
    """A loop whose body the program holds once.

    Attributes:
        index: the iteration counter ``[length]``; its axis is the scanned axis, fixed.
        carries: what an iteration starts with.
        next_carries: what it hands to the next one.
    """

    index: Value
    carries: list[Value] = field(default_factory=list)
    next_carries: list[Value] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Number of iterations."""
        return self.index.shape[0]


@dataclass(eq=False)
class Equation:
    """One primitive application; ``path`` locates it in the nested jaxprs, ``scans`` are the loops around it.

    ``tappable`` is false inside functions with custom derivatives, where a perturbation of an intermediate value would
    not get the derivative that the function defines.
    """

    primitive: Primitive
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    path: Path
    tappable: bool
    scans: tuple[Scan, ...] = ()

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name

    def bind(self, *inputs: Array) -> Array:
        """Apply the primitive to arrays; of primitives with one output. Its spread over devices is the compiler's."""
        params = self.params | {name: None for name in ("out_sharding", "sharding") if name in self.params}
        result: Array = self.primitive.bind(*inputs, **self.primitive.get_bind_params(params))
        return result

    def operand(self, value: Value) -> int:
        """The position of a value among the inputs."""
        return next(i for i, other in enumerate(self.inputs) if other is value)


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


# The primitives that call a jaxpr, and whether its inside may be tapped.
CALLS = {
    "jit": True,
    "pjit": True,
    "closed_call": True,
    "remat2": True,
    "checkpoint": True,
    "custom_jvp_call": False,
    "custom_vjp_call": False,
}


def called(params: dict[str, Any]) -> tuple[Jaxpr, Sequence[Any]]:
    """The jaxpr that a call calls, and its constants."""
    jaxpr = params["call_jaxpr" if "call_jaxpr" in params else "jaxpr"]
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


SCAN_INDEX, SCAN_ENTER, SCAN_SLICE, SCAN_EXIT, COND_EXIT = (
    Primitive(name) for name in ("scan_index", "scan_enter", "scan_slice", "scan_exit", "cond_exit")
)


def scan_parts(params: dict[str, Any], inputs: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The inputs of a scan equation: what is the same in every iteration, the first carry, and the scanned arrays."""
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    return list(inputs[:first]), list(inputs[first:last]), list(inputs[last:])


def flatten(closed: ClosedJaxpr, num_parameters: int) -> Program:
    """Inline a closed jaxpr whose first inputs are the parameters and whose first output is the loss."""
    flat = _Flattener()
    invars = closed.jaxpr.invars
    parameters = [_value(var, "parameter") for var in invars[:num_parameters]]
    data = [_value(var, "data") for var in invars[num_parameters:]]
    outputs = flat.inline(closed.jaxpr, flat.constants_of(closed.jaxpr), [*parameters, *data], _Place((), True, ()))
    equations = _live(flat.equations, outputs[0])
    return Program(parameters, data, equations, outputs[0], flat.constants)


@dataclass(frozen=True)
class _Place:
    """Where a jaxpr stands: its path, whether it may be tapped, and the loops around it."""

    path: Path
    tappable: bool
    scans: tuple[Scan, ...]

    def enter(self, index: int, tappable: bool = True) -> "_Place":
        return replace(self, path=(*self.path, index), tappable=self.tappable and tappable)


class _Flattener:
    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self.constants: list[Value] = []

    def constants_of(self, jaxpr: Jaxpr) -> list[Value]:
        values = [_value(var, "data") for var in jaxpr.constvars]
        self.constants.extend(values)
        return values

    def inline(self, jaxpr: Jaxpr, constants: list[Value], arguments: list[Value], place: _Place) -> list[Value]:
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
            if eqn.primitive.name in CALLS:
                inner, _ = called(eqn.params)
                inside = place.enter(index, CALLS[eqn.primitive.name])
                outputs = self.inline(inner, self.constants_of(inner), inputs, inside)
            elif eqn.primitive.name == "scan":
                outputs = self.scan(eqn, inputs, place.enter(index))
            elif eqn.primitive.name == "cond":
                outputs = self.cond(eqn, inputs, place.enter(index))
            elif eqn.primitive.name == "split":
                outputs = self.split(eqn, inputs, place.enter(index))
            elif eqn.primitive.name == "optimization_barrier":
                outputs = [_value(var, "equation") for var in eqn.outvars]
                for value, output in zip(inputs, outputs):
                    self.emit(eqn.primitive, eqn.params, [value], [output], place.enter(index))
            else:
                outputs = [_value(var, "equation") for var in eqn.outvars]
                self.emit(eqn.primitive, eqn.params, inputs, outputs, place.enter(index))
            environment.update(zip(eqn.outvars, outputs))
        return [read(atom) for atom in jaxpr.outvars]

    def emit(
        self, primitive: Primitive, params: dict[str, Any], inputs: list[Value], outputs: list[Value], place: _Place
    ) -> None:
        self.equations.append(Equation(primitive, params, inputs, outputs, place.path, place.tappable, place.scans))

    def split(self, eqn: Any, inputs: list[Value], place: _Place) -> list[Value]:
        shape, axis, start = inputs[0].shape, eqn.params["axis"], 0
        outputs = [_value(var, "equation") for var in eqn.outvars]
        for output in outputs:
            starts = [start if d == axis else 0 for d in range(len(shape))]
            limits = tuple(first + size for first, size in zip(starts, output.shape))
            params = {"start_indices": tuple(starts), "limit_indices": limits, "strides": None}
            self.emit(jax.lax.slice_p, params, inputs, [output], place)
            start = limits[axis]
        return outputs

    def cond(self, eqn: Any, inputs: list[Value], place: _Place) -> list[Value]:
        index, *operands = inputs
        results = []
        for i, branch in enumerate(eqn.params["branches"]):
            results += self.inline(branch.jaxpr, self.constants_of(branch.jaxpr), operands, place.enter(i))
        outputs = [_value(var, "equation") for var in eqn.outvars]
        for i, output in enumerate(outputs):
            self.emit(COND_EXIT, {}, [index, *results[i :: len(outputs)]], [output], place)
        return outputs

    def scan(self, eqn: Any, inputs: list[Value], place: _Place) -> list[Value]:
        body = eqn.params["jaxpr"].jaxpr
        constants, first, scanned = scan_parts(eqn.params, inputs)
        _, carry_vars, slice_vars = scan_parts(eqn.params, body.invars)
        scan = Scan(Value((eqn.params["length"],), "equation", jnp.int32))
        scan.carries = [_value(var, "equation") for var in carry_vars]
        slices = [_value(var, "equation") for var in slice_vars]
        inside = replace(place, scans=(*place.scans, scan))
        self.emit(SCAN_INDEX, {}, [], [scan.index], place)
        if first:
            # Through the iterations before, a carry depends on everything that the loop reads.
            self.emit(SCAN_ENTER, {"also": [*constants, *scanned]}, first, scan.carries, place)
        for whole, part in zip(scanned, slices):
            self.emit(SCAN_SLICE, {"scan": scan}, [whole, scan.index], [part], inside)
        results = self.inline(body, self.constants_of(body), [*constants, *scan.carries, *slices], inside)
        scan.next_carries, stacked = results[: len(first)], results[len(first) :]
        outputs = [_value(var, "equation") for var in eqn.outvars]
        used = [scan.index, *scan.carries, *scan.next_carries, *stacked]
        self.emit(SCAN_EXIT, {"carries": len(first)}, used, outputs, place)
        return outputs


def _value(var: Any, origin: str) -> Value:
    return Value(tuple(getattr(var.aval, "shape", ())), origin, getattr(var.aval, "dtype", None), var.aval)


def _live(equations: list[Equation], output: Value) -> list[Equation]:
    needed = {output}
    kept = []
    for equation in reversed(equations):
        if any(value in needed for value in equation.outputs):
            needed.update(equation.inputs)
            kept.append(equation)
    return kept[::-1]
