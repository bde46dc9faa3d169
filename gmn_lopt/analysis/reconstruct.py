"""Dense gradients from factors: the outer products pulled back through the views of the parameters."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from gmn_lopt.analysis.layers import BiasUse, LayerUse, View
from gmn_lopt.analysis.layout import Layout
from gmn_lopt.analysis.program import Equation

KernelGradient = Callable[[Float[Array, "S d_in"], Float[Array, "S d_out"], jax.ShapeDtypeStruct], Float[Array, "..."]]
BiasGradient = Callable[[Float[Array, "S d_out"], jax.ShapeDtypeStruct], Float[Array, "..."]]


def bind(equation: Equation, *inputs: jax.Array) -> jax.Array:
    """Apply an equation's primitive."""
    params = equation.primitive.get_bind_params(equation.params)
    return equation.primitive.bind(*inputs, **params)


def _through(chain: tuple[Equation, ...], array: jax.Array) -> jax.Array:
    for equation in chain:
        array = bind(equation, array)
    return array


def _pull_back(function: Callable[[jax.Array], jax.Array], leaf: jax.ShapeDtypeStruct, tangent: jax.Array) -> jax.Array:
    """Transpose a linear function of a parameter."""
    (gradient,) = jax.linear_transpose(function, leaf)(tangent)
    return gradient


def kernel_gradient(layer: LayerUse, activation_layout: Layout, output_layout: Layout) -> KernelGradient:
    """``(activation, tangent, leaf) -> gradient`` of one layer's kernel."""

    def gradient(
        activation: Float[Array, "S d_in"], tangent: Float[Array, "S d_out"], leaf: jax.ShapeDtypeStruct
    ) -> Float[Array, "..."]:
        a = activation_layout.original(activation)

        def product(w: jax.Array) -> jax.Array:
            w = _through(layer.view.chain, w)
            return bind(layer.equation, *((w, a) if layer.side == 0 else (a, w)))

        return _pull_back(product, leaf, output_layout.original(tangent))

    return gradient


def bias_gradient(bias: BiasUse, output_layout: Layout) -> BiasGradient:
    """``(tangent, leaf) -> gradient`` of a layer's bias."""
    view: View = bias.view
    shape = bias.add.outputs[0].shape

    def gradient(tangent: Float[Array, "S d_out"], leaf: jax.ShapeDtypeStruct) -> Float[Array, "..."]:
        def broadcast(b: jax.Array) -> jax.Array:
            return jax.numpy.broadcast_to(_through(view.chain, b), shape)

        return _pull_back(broadcast, leaf, _through(bias.chain, output_layout.original(tangent)))

    return gradient
