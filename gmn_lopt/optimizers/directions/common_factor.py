"""By what the gradient has been multiplied since its factors were computed: loss scaling, or clipping by its norm.

The noise of the momentum is read from the tangents, which such a factor leaves as they were. So the gradients of a few
small layers are made again from their factors. Where they are the given ones up to a factor, that factor is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from gmn_lopt.factors.structure import Layer
from gmn_lopt.optimizers.leaves import Gradient

# How many layers are compared, the smallest ones: one could have a gradient of zero.
COMPARED = 4
# The cosine above which gradients are taken to be the same up to a factor. One that something was added to, or the mean
# over devices that keep factors of their own, may be below; the factor is one then.
ALIKE = 0.5


@partial(
    jax.tree_util.register_dataclass, data_fields=("gradients", "activations", "tangents"), meta_fields=("layers",)
)
@dataclass(frozen=True)
class Comparison:
    """Layers whose gradients are compared.

    Attributes:
        layers: the layers.
        gradients: of their kernels, as given.
        activations, tangents: their factors, the tangents per element.
    """

    layers: tuple[Layer, ...] = ()
    gradients: tuple[Float[Array, "..."], ...] = ()
    activations: tuple[Num[Array, "_ _"], ...] = ()
    tangents: tuple[Float[Array, "_ _"], ...] = ()


NOTHING = Comparison()


def comparison(gradient: Gradient) -> Comparison:
    """The smallest layers of which the whole gradient is known from one pair of factors."""
    structure, leaves = gradient.structure, jax.tree.leaves(gradient.grads)
    position = {index: i for i, index in enumerate(gradient.indices)}
    kernels = [layer.kernel for layer in structure.layers]
    known = [
        layer
        for layer in structure.layers
        if layer.gradients is not None
        and layer.kernel in position
        and kernels.count(layer.kernel) == 1
        and structure.parameters[layer.kernel].status == "factored"
    ]
    layers = sorted(known, key=lambda layer: structure.parameters[layer.kernel].size)[:COMPARED]
    if gradient.factors is None:
        return NOTHING
    return Comparison(
        tuple(layers),
        tuple(leaves[position[layer.kernel]] for layer in layers),
        tuple(gradient.factors.activations[layer.activation] for layer in layers),
        tuple(gradient.factors.tangents[layer.tangent] for layer in layers),
    )


def common_factor(comparison: Comparison) -> Float[Array, ""]:
    """The ratio of the norms of the given gradients and of those of the factors; one where they are not alike."""
    given, made = [], []
    for layer, gradient, a, g in zip(
        comparison.layers, comparison.gradients, comparison.activations, comparison.tangents
    ):
        assert layer.gradients is not None
        given.append(gradient.ravel())
        made.append(layer.gradients(a, g / g.shape[0])[0].ravel())
    if not given:
        return jnp.ones(())
    (x, size), (y, other) = _of_unit_size(given), _of_unit_size(made)
    xx, xy, yy = jnp.vdot(x, x), jnp.vdot(x, y), jnp.vdot(y, y)
    alike = xy**2 > ALIKE**2 * xx * yy
    return jnp.where(alike, jnp.sqrt(xx / jnp.where(alike, yy, 1.0)) * (size / other), 1.0)


def _of_unit_size(parts: Sequence[Float[Array, " _"]]) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """A vector divided by its largest entry, so that no square is too small or too large, and that entry."""
    whole = jnp.concatenate(parts)
    largest = jnp.maximum(jnp.abs(whole).max(initial=0.0), jnp.finfo(whole.dtype).tiny)
    return whole / largest, largest
