"""Dense gradients from factors: outer products, pulled back through what is done to parameters before their use."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from gmn_lopt.factors.jaxpr.layers import BiasUse, LayerUse
from gmn_lopt.factors.jaxpr.sites import Factor, Kernel
from gmn_lopt.factors.jaxpr.weights import IDENTITIES
from gmn_lopt.factors.program import Equation, Program, Scan, Value


class Parts(NamedTuple):
    """Parts of the gradient: of parameters, and of what is computed from parameters, by where it is used."""

    leaves: list[tuple[int, Array]]
    derived: list[tuple[Hashable, Array]]


Gradients = Callable[[Array, Array], Parts]


def kernel_gradients(program: Program, kernel: Kernel, read: Factor, write: Factor) -> Gradients:
    """``(activation, tangent) -> parts of the gradient`` of the layers of one kernel."""

    def gradients(activation: Shaped[Array, "R d_in"], tangent: Float[Array, "S d_out"]) -> Parts:
        parts = Parts([], [])
        for layer, a, g in zip(kernel.layers, read.split(activation), write.split(tangent)):
            if layer.first:
                _add_kernel(program, layer, a, g, parts)
            if layer.bias is not None:
                _add_bias(program, layer, layer.bias, g, parts)
        return parts

    return gradients


def _add_kernel(program: Program, layer: LayerUse, activation: Array, tangent: Array, parts: Parts) -> None:
    product = partial(layer.kind.product, layer.equation, layer.operand)
    if layer.weight.raw and layer.view is not None:
        whole = _over_scans(layer.scans, layer.view.chain, product)
        value = program.parameters[layer.view.leaf]
        parts.leaves.append((layer.view.leaf, _pull_back(lambda w: whole(w, activation), value, tangent)))
        return
    block = _over_all(layer.scans, lambda w, a: product(w[layer.piece.slices], a))
    value = layer.equation.inputs[layer.operand]
    gradient = _pull_back(lambda w: block(w, activation), value, tangent, layer.scans)
    parts.derived.append(((layer.equation.path, layer.operand), gradient))


def _add_bias(program: Program, layer: LayerUse, bias: BiasUse, tangent: Array, parts: Parts) -> None:
    rearrange = partial(_through, bias.chain)
    for _ in layer.scans:
        rearrange = jax.vmap(rearrange)
    moved = rearrange(tangent)
    if bias.weight.raw and bias.view is not None:
        added = _over_scans(layer.scans, bias.view.chain, lambda b, u: jnp.broadcast_to(b, u.shape))
        value = program.parameters[bias.view.leaf]
        parts.leaves.append((bias.view.leaf, _pull_back(lambda b: added(b, moved), value, moved)))
        return
    value = bias.add.inputs[bias.operand]
    region: tuple[slice, ...] = (...,)  # type: ignore[assignment]
    if layer.is_part:
        region = tuple(part if size != 1 else slice(0, 1) for part, size in zip(layer.regions[1], value.shape))
    added = _over_all(layer.scans, lambda b, u: jnp.broadcast_to(b[region], u.shape))
    gradient = _pull_back(lambda b: added(b, moved), value, moved, layer.scans)
    parts.derived.append(((bias.add.path, bias.operand), gradient))


def _pull_back(function: Callable[[Array], Array], value: Value, tangent: Array, scans: tuple[Scan, ...] = ()) -> Array:
    shape = (*(scan.length for scan in scans), *value.shape)
    gradient: Array
    (gradient,) = jax.linear_transpose(function, jax.ShapeDtypeStruct(shape, value.dtype))(tangent)
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
