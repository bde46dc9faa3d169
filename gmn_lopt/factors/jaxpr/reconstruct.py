"""Dense gradients from factors: outer products, pulled back through what is done to parameters before their use."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from gmn_lopt.factors.jaxpr.layers import BiasUse, LayerUse
from gmn_lopt.factors.jaxpr.sites import Factor, Kernel
from gmn_lopt.factors.jaxpr.weights import IDENTITIES
from gmn_lopt.factors.parallel import leave_to_compiler, make_varying, varying
from gmn_lopt.factors.program import Equation, Program, Scan, Value


class Parts(NamedTuple):
    """Parts of the gradient: of parameters by index, and of what is computed from them by where it is used."""

    leaves: dict[int, Any]
    derived: dict[Hashable, Any]

    def put(self, leaf: int | None, place: Hashable, gradient: Any, add: bool = False) -> None:
        """Set, or add to, the gradient of a parameter; of what is used at a place if it is not simply one."""
        part: dict[Any, Any] = self.derived if leaf is None else self.leaves
        key = place if leaf is None else leaf
        part[key] = part[key] + gradient if add and key in part else gradient


Gradients = Callable[[Array, Array], Parts]


def kernel_gradients(program: Program, kernel: Kernel, read: Factor, write: Factor) -> Gradients:
    """``(activation, tangent) -> parts of the gradient`` of the layers of one kernel."""

    def gradients(activation: Shaped[Array, "R d_in"], tangent: Float[Array, "S d_out"]) -> Parts:
        parts = Parts({}, {})
        axes = varying(activation, tangent)
        for layer, a, g in zip(kernel.layers, read.split(activation), write.split(tangent)):
            a, g = make_varying(a, axes), make_varying(g, axes)
            if layer.first:
                parts.put(*_kernel_place(layer), _of_kernel(program, layer, a, g), add=True)
            if layer.bias is not None:
                parts.put(*_bias_place(layer.bias), _of_bias(program, layer, layer.bias, g), add=True)
        return parts

    everywhere = Parts({}, {})
    for layer in kernel.layers:
        if layer.first:
            everywhere.put(*_kernel_place(layer), PartitionSpec())
        if layer.bias is not None:
            everywhere.put(*_bias_place(layer.bias), PartitionSpec())
    return partial(leave_to_compiler, gradients, everywhere)


def _kernel_place(layer: LayerUse) -> tuple[int | None, Hashable]:
    leaf = layer.view.leaf if layer.weight.raw and layer.view is not None else None
    return leaf, (layer.equation.path, layer.operand)


def _bias_place(bias: BiasUse) -> tuple[int | None, Hashable]:
    leaf = bias.view.leaf if bias.weight.raw and bias.view is not None else None
    return leaf, (bias.add.path, bias.operand)


def _of_kernel(program: Program, layer: LayerUse, activation: Array, tangent: Array) -> Array:
    product = partial(layer.kind.product, layer.equation, layer.operand)
    if layer.weight.raw and layer.view is not None:
        whole = _over_scans(layer.scans, layer.view.chain, product)
        return _pull_back(lambda w: whole(w, activation), program.parameters[layer.view.leaf], tangent)
    block = _over_all(layer.scans, lambda w, a: product(w[layer.piece.slices], a))
    value = layer.equation.inputs[layer.operand]
    return _pull_back(lambda w: block(w, activation), value, tangent, layer.scans)


def _of_bias(program: Program, layer: LayerUse, bias: BiasUse, tangent: Array) -> Array:
    rearrange = partial(_through, bias.chain)
    for _ in layer.scans:
        rearrange = jax.vmap(rearrange)
    moved = rearrange(tangent)
    if bias.weight.raw and bias.view is not None:
        added = _over_scans(layer.scans, bias.view.chain, lambda b, u: jnp.broadcast_to(b, u.shape))
        return _pull_back(lambda b: added(b, moved), program.parameters[bias.view.leaf], moved)
    value = bias.add.inputs[bias.operand]
    region = [slice(None)] * len(value.shape)
    if layer.is_part:
        region = [part if size != 1 else slice(0, 1) for part, size in zip(layer.regions[1], value.shape)]
    added = _over_all(layer.scans, lambda b, u: jnp.broadcast_to(b[tuple(region)], u.shape))
    return _pull_back(lambda b: added(b, moved), value, moved, layer.scans)


def _pull_back(function: Callable[[Array], Array], value: Value, tangent: Array, scans: tuple[Scan, ...] = ()) -> Array:
    shape = (*(scan.length for scan in scans), *value.shape)
    gradient: Array
    # Each device's own gradient: that of a parameter which does not vary would be the sum over devices.
    kernel = make_varying(jnp.zeros(shape, value.dtype), varying(tangent))
    (gradient,) = jax.linear_transpose(function, kernel)(tangent)
    return gradient


def _through(chain: tuple[Equation, ...], array: Array) -> Array:
    for equation in chain:
        array = array if equation.name in IDENTITIES else equation.bind(array)
    return array


def _over_all(scans: tuple[Scan, ...], apply: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """``apply`` for every iteration of the loops, each with an operand of its own."""
    for _ in scans:
        apply = jax.vmap(apply)
    return apply


def _over_scans(
    scans: tuple[Scan, ...], chain: tuple[Equation, ...], apply: Callable[[Array, Array], Array]
) -> Callable[[Array, Array], Array]:
    """``apply(view of the parameter, x)`` for every iteration of the loops: a function of the parameter and all ``x``.

    Loops that slice the parameter run over a stack of parameters, all others see the same one in every iteration.
    """
    if not scans:
        return lambda w, x: apply(_through(chain, w), x)
    places = [i for i, equation in enumerate(chain) if equation.params.get("scan") is scans[0]]
    if not places:
        return jax.vmap(_over_scans(scans[1:], chain, apply), in_axes=(None, 0))
    (at,) = places
    inside = jax.vmap(_over_scans(scans[1:], chain[at + 1 :], apply))
    return lambda w, x: inside(_through(chain[:at], w), x)
