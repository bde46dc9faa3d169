"""Evaluation of a loss from its jaxpr, with its layers tapped; calls, branches, loops and remat regions are kept."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array

from gmn_lopt.factors.parallel import as_in_context
from gmn_lopt.factors.program import Path, called, scan_parts


@dataclass(frozen=True)
class Tap:
    """What happens at an equation.

    Attributes:
        records: by key, which operand is recorded, and what of it.
        perturbed: whether a perturbation is added to its output.
    """

    records: tuple[tuple[Hashable, int, Callable[[Array], Array]], ...] = ()
    perturbed: bool = False


class Replay:
    """One evaluation of the loss: at each tap operands are recorded, and a perturbation is added to the output.

    The derivative of the loss in a perturbation is the layer's tangent. Inside of loops both have an axis in front for
    the iterations; of a branch that is not taken zeros are recorded.

    Attributes:
        taps: the taps, by their place in the nested jaxprs.
        perturbations: zeros like the outputs, by place.
        recorded: what is recorded, by key; filled in by :meth:`jaxpr`.
    """

    def __init__(self, taps: dict[Path, Tap], perturbations: dict[Path, Array]):
        self.taps = taps
        self.perturbations = perturbations
        self.recorded: dict[Hashable, Array] = {}
        self.inside = {path[:i] for path in taps for i in range(1, len(path))}

    def jaxpr(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], path: Path) -> list[Any]:
        """Evaluate a jaxpr; calls with taps inside are entered, all others are bound as they are."""
        environment = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else environment[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            inputs = [read(atom) for atom in eqn.invars]
            here = (*path, index)
            tap = self.taps.get(here, Tap())
            with eqn.ctx.manager:
                # What a layer reads may be a constant of the loss, a NumPy array.
                self.recorded.update((key, of(_as_array(inputs[operand]))) for key, operand, of in tap.records)
                if here in self.inside:
                    outputs = self._enter(eqn, inputs, here)
                else:
                    result = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
                    outputs = result if eqn.primitive.multiple_results else [result]
                if tap.perturbed:
                    outputs = [outputs[0] + as_in_context(self.perturbations[here])]
            environment.update(zip(eqn.outvars, outputs))
        return [read(atom) for atom in jaxpr.outvars]

    def _enter(self, eqn: Any, inputs: list[Any], path: Path) -> list[Any]:
        # Perturbations go into loops and rematerialised regions and what is recorded comes out: inside stays pure.
        taps = {at: tap for at, tap in self.taps.items() if at[: len(path)] == path}
        perturbations = {at: self.perturbations[at] for at, tap in taps.items() if tap.perturbed}

        def region(
            jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], perturbations: dict[Path, Array], at: Path
        ) -> tuple[list[Any], dict[Hashable, Array]]:
            inner = Replay(taps, perturbations)
            return inner.jaxpr(jaxpr, consts, inputs, at), inner.recorded

        if eqn.primitive.name == "scan":
            outputs, recorded = _scan(eqn.params, inputs, perturbations, region, path)
        elif eqn.primitive.name == "cond":
            outputs, recorded = _cond(eqn.params["branches"], inputs, perturbations, region, path)
        elif eqn.primitive.name in ("remat2", "checkpoint"):
            jaxpr, consts = called(eqn.params)
            again = jax.checkpoint(
                lambda inputs, perturbations: region(jaxpr, consts, inputs, perturbations, path),
                policy=eqn.params["policy"],
                prevent_cse=eqn.params["prevent_cse"],
            )
            outputs, recorded = again(inputs, perturbations)
        else:
            outputs, recorded = region(*called(eqn.params), inputs, perturbations, path)
        self.recorded.update(recorded)
        return outputs


Region = Callable[..., tuple[list[Any], dict[Hashable, Array]]]


def _scan(
    params: dict[str, Any], inputs: list[Any], perturbations: dict[Path, Array], region: Region, path: Path
) -> tuple[list[Any], dict[Hashable, Array]]:
    """A loop: slices of the perturbations are scanned over, and what is recorded is stacked."""
    closed: ClosedJaxpr = params["jaxpr"]
    constants, first, scanned = scan_parts(params, inputs)

    def body(carry: list[Any], slices: tuple[list[Any], dict[Path, Array]]) -> tuple[list[Any], Any]:
        outputs, recorded = region(closed.jaxpr, closed.consts, [*constants, *carry, *slices[0]], slices[1], path)
        return outputs[: len(carry)], (outputs[len(carry) :], recorded)

    settings = {name: params[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in params}
    carry, (stacked, recorded) = jax.lax.scan(body, first, (scanned, perturbations), **settings)
    return [*carry, *stacked], recorded


def _cond(
    branches: Sequence[ClosedJaxpr],
    inputs: list[Any],
    perturbations: dict[Path, Array],
    region: Region,
    path: Path,
) -> tuple[list[Any], dict[Hashable, Array]]:
    """Branches, of which the one that is taken records; in all others its records are zeros."""
    index, *operands = inputs

    def run(i: int, operands: list[Any], perturbations: dict[Path, Array]) -> Any:
        return region(branches[i].jaxpr, branches[i].consts, operands, perturbations, (*path, i))

    shapes: dict[Hashable, jax.ShapeDtypeStruct] = {}
    for i in range(len(branches)):
        shapes |= jax.eval_shape(lambda i=i: run(i, operands, perturbations))[1]

    def branch(i: int) -> Callable[..., Any]:
        def function(operands: list[Any], perturbations: dict[Path, Array]) -> Any:
            outputs, recorded = run(i, operands, perturbations)
            return outputs, {key: recorded.get(key, jnp.zeros(of.shape, of.dtype)) for key, of in shapes.items()}

        return function

    return jax.lax.switch(index, [branch(i) for i in range(len(branches))], operands, perturbations)


def _as_array(x: Any) -> Any:
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x
