"""Dense gradients from factors: the outer products pulled back through the views of the parameters."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from gmn_lopt.factors.jaxpr.layers import PLACEMENTS, LayerUse
from gmn_lopt.factors.jaxpr.sites import Layout
from gmn_lopt.factors.parallel import leave_to_compiler, make_varying, varying
from gmn_lopt.factors.program import Equation, Program, Scan

Gradients = Callable[[Array, Array], tuple[Array, Array | None]]


def _through(chain: tuple[Equation, ...], array: jax.Array) -> jax.Array:
    for equation in chain:
        # How a parameter was spread over devices in the loss is nothing to its gradient.
        array = array if equation.name in PLACEMENTS else equation.bind(array)
    return array


def _over_scans(
    scans: tuple[Scan, ...], chain: tuple[Equation, ...], apply: Callable[[jax.Array, jax.Array], jax.Array]
) -> Callable[[jax.Array, jax.Array], jax.Array]:
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


def layer_gradients(program: Program, layer: LayerUse, activation_layout: Layout, output_layout: Layout) -> Gradients:
    """``(activation, tangent) -> (gradient of the kernel, gradient of the bias or None)`` of one layer."""
    product = _over_scans(layer.scans, layer.view.chain, partial(layer.kind.product, layer.equation, layer.operand))

    def pull_back(function: Callable[[jax.Array], jax.Array], leaf: int, tangent: jax.Array) -> jax.Array:
        value = program.parameters[leaf]
        # Each device's own gradient: that of a parameter which does not vary would be the sum over devices.
        parameter = make_varying(jnp.zeros(value.shape, value.dtype), varying(tangent))
        (gradient,) = jax.linear_transpose(function, parameter)(tangent)
        return gradient

    def gradients(
        activation: Shaped[Array, "R d_in"], tangent: Float[Array, "S d_out"]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
        axes = varying(activation, tangent)
        a, g = activation_layout.original(activation), output_layout.original(tangent)
        a, g = make_varying(a, axes), make_varying(g, axes)
        kernel = pull_back(lambda w: product(w, a), layer.view.leaf, g)
        if layer.bias is None:
            return kernel, None
        rearrange = partial(_through, layer.bias.chain)
        for _ in layer.scans:
            rearrange = jax.vmap(rearrange)
        added = _over_scans(layer.scans, layer.bias.view.chain, lambda b, u: jnp.broadcast_to(b, u.shape))
        moved = rearrange(g)
        return kernel, pull_back(lambda b: added(b, moved), layer.bias.view.leaf, moved)

    everywhere = PartitionSpec(), None if layer.bias is None else PartitionSpec()
    return partial(leave_to_compiler, gradients, everywhere)
