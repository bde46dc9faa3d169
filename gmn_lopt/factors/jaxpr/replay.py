"""Evaluation of a loss from its jaxpr, with its layers tapped; calls, loops and rematerialised regions are kept."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array

from gmn_lopt.factors.jaxpr.layers import LayerUse
from gmn_lopt.factors.parallel import as_in_context
from gmn_lopt.factors.program import Path, called, scan_parts


class Replay:
    """One evaluation of the loss: at each tap the activation is recorded, and a perturbation is added to the output.

    The derivative of the loss in a perturbation is the layer's tangent.

    Attributes:
        taps: the layers, by their place in the nested jaxprs.
        perturbations: zeros like the outputs, by index of the tangent.
        recorded: the activations, by index; filled in by :meth:`jaxpr`.
    """

    def __init__(self, taps: dict[Path, LayerUse], perturbations: dict[int, Array]):
        self.taps = taps
        self.perturbations = perturbations
        self.recorded: dict[int, Array] = {}
        self.inside = {path[:i] for path in taps for i in range(1, len(path))}

    def jaxpr(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], path: Path) -> list[Any]:
        """Evaluate a jaxpr; calls with taps inside are entered, all others are bound as they are."""
        environment = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else environment[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            inputs = [read(atom) for atom in eqn.invars]
            here = (*path, index)
            with eqn.ctx.manager:
                if here in self.inside:
                    outputs = self._enter(eqn, inputs, here)
                else:
                    result = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
                    outputs = result if eqn.primitive.multiple_results else [result]
                if (layer := self.taps.get(here)) is not None:
                    if layer.records:
                        self.recorded[layer.read] = layer.kind.record(layer.equation, inputs[1 - layer.operand])
                    if layer.perturbed:
                        outputs = [outputs[0] + as_in_context(self.perturbations[layer.write])]
            environment.update(zip(eqn.outvars, outputs))
        return [read(atom) for atom in jaxpr.outvars]

    def _enter(self, eqn: Any, inputs: list[Any], path: Path) -> list[Any]:
        # Perturbations go into loops and rematerialised regions and activations come out: inside stays pure.
        taps = {at: tap for at, tap in self.taps.items() if at[: len(path)] == path}
        perturbations = {tap.write: self.perturbations[tap.write] for tap in taps.values() if tap.perturbed}
        if eqn.primitive.name == "scan":
            return self._scan(eqn, inputs, path, taps, perturbations)
        jaxpr, consts = called(eqn.params)
        if eqn.primitive.name not in ("remat2", "checkpoint"):
            return self.jaxpr(jaxpr, consts, inputs, path)

        def region(inputs: list[Any], perturbations: dict[int, Array]) -> tuple[list[Any], dict[int, Array]]:
            inner = Replay(taps, perturbations)
            return inner.jaxpr(jaxpr, consts, inputs, path), inner.recorded

        policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
        outputs, recorded = jax.checkpoint(region, policy=policy, prevent_cse=prevent_cse)(inputs, perturbations)
        self.recorded.update(recorded)
        return outputs

    def _scan(
        self, eqn: Any, inputs: list[Any], path: Path, taps: dict[Path, LayerUse], perturbations: dict[int, Array]
    ) -> list[Any]:
        """A loop: slices of the perturbations are scanned over, and the activations are stacked."""
        params = eqn.params
        closed: ClosedJaxpr = params["jaxpr"]
        constants, first, scanned = scan_parts(params, inputs)

        def body(carry: list[Any], slices: tuple[list[Any], dict[int, Array]]) -> tuple[list[Any], Any]:
            inner = Replay(taps, slices[1])
            outputs = inner.jaxpr(closed.jaxpr, closed.consts, [*constants, *carry, *slices[0]], path)
            return outputs[: len(carry)], (outputs[len(carry) :], inner.recorded)

        carry, (stacked, recorded) = jax.lax.scan(
            body,
            first,
            (scanned, perturbations),
            **{name: params[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in params},
        )
        self.recorded.update(recorded)
        return [*carry, *stacked]
