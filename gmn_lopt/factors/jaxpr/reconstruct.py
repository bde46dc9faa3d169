"""Dense gradients from factors: the outer products pulled back through the views of the parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from gmn_lopt.factors.jaxpr.layers import LayerUse
from gmn_lopt.factors.jaxpr.layout import Layout
from gmn_lopt.factors.program import Equation, Scan

KernelGradient = Callable[[Shaped[Array, "R d_in"], Float[Array, "S d_out"], jax.ShapeDtypeStruct], Float[Array, "..."]]
BiasGradient = Callable[[Float[Array, "S d_out"], jax.ShapeDtypeStruct], Float[Array, "..."]]


def _through(chain: tuple[Equation, ...], array: jax.Array) -> jax.Array:
    for equation in chain:
        array = equation.bind(array)
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


def _pull_back(function: Callable[[jax.Array], jax.Array], leaf: jax.ShapeDtypeStruct, tangent: jax.Array) -> jax.Array:
    """Transpose a linear function of a parameter."""
    (gradient,) = jax.linear_transpose(function, leaf)(tangent)
    return gradient


def kernel_gradient(layer: LayerUse, activation_layout: Layout, output_layout: Layout) -> KernelGradient:
    """``(activation, tangent, leaf) -> gradient`` of one layer's kernel; their sets differ where positions do."""

    def apply(w: jax.Array, a: jax.Array) -> jax.Array:
        return layer.kind.product(layer.equation, layer.operand, w, a)

    product = _over_scans(layer.scans, layer.view.chain, apply)

    def gradient(
        activation: Shaped[Array, "R d_in"], tangent: Float[Array, "S d_out"], leaf: jax.ShapeDtypeStruct
    ) -> Float[Array, "..."]:
        a = activation_layout.original(activation)
        return _pull_back(lambda w: product(w, a), leaf, output_layout.original(tangent))

    return gradient


def bias_gradient(layer: LayerUse, output_layout: Layout) -> BiasGradient:
    """``(tangent, leaf) -> gradient`` of a layer's bias."""
    bias = layer.bias
    assert bias is not None
    rearrange: Callable[[jax.Array], jax.Array] = lambda u: _through(bias.chain, u)  # noqa: E731
    for _ in layer.scans:
        rearrange = jax.vmap(rearrange)
    added = _over_scans(layer.scans, bias.view.chain, lambda b, u: jnp.broadcast_to(b, u.shape))

    def gradient(tangent: Float[Array, "S d_out"], leaf: jax.ShapeDtypeStruct) -> Float[Array, "..."]:
        g = rearrange(output_layout.original(tangent))
        return _pull_back(lambda b: added(b, g), leaf, g)

    return gradient
