"""By what the gradient has been multiplied since its factors were computed: loss scaling, or clipping by its norm.

The noise of the momentum is read from the tangents, which such a factor leaves as they were. So the gradients of a few
small layers are made again from their factors. Where they are the given ones up to a factor, that factor is known.

Of a large model that would cost as much as a part of the backward pass. There gradients are compared by their products
with a few random vectors, which the factors give without the gradient: ``sum_s a_s (g_s . w)``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gmn_lopt.factors.kinds import Dense
from gmn_lopt.optimizers.directions.denoised_layers import LayerGroup
from gmn_lopt.optimizers.leaves import Gradient

# How many layers are compared, the smallest ones: one could have a gradient of zero.
COMPARED = 4
# The cosine above which gradients are taken to be the same up to a factor. One that something was added to, or the mean
# over devices that keep factors of their own, may be below; the factor is one then.
ALIKE = 0.5
# Of a large model: random vectors of signs.
VECTORS = 8


class Comparison(NamedTuple):
    """A layer whose gradient is compared.

    Attributes:
        gradient: of the kernel, as given, as matrices.
        activation, tangent: the factors of it, the tangents per element.
    """

    gradient: Float[Array, "k i o"]
    activation: Float[Array, "k S i"]
    tangent: Float[Array, "k S o"]


def comparisons(groups: Sequence[LayerGroup], gradient: Gradient, large: bool = False) -> tuple[Comparison, ...]:
    """The smallest dense layers whose kernels are parameters and have no other use.

    Of a large model, with products with random vectors in place of the outputs.
    """
    factors, parameters, leaves = gradient.factors, gradient.parameters, jax.tree.leaves(gradient.grads)
    layers = [x for group in groups for x in group.layers if x.direct and isinstance(x.kind, Dense)]
    found: list[Comparison] = []
    for layer in sorted(layers, key=lambda layer: parameters[layer.kernel].size):
        assert factors is not None
        kind, kernel = layer.kind, parameters[layer.kernel]
        activation = kind.activation_rows(kernel, factors.activations[layer.activation])
        tangent = kind.tangent_rows(kernel, factors.tangents[layer.tangent])
        if kernel.status == "factored":
            whole = kind.as_matrices(kernel, leaves[layer.kernel])
            if large and tangent.shape[2] > VECTORS:
                signs = np.random.default_rng(0).choice([-1.0, 1.0], (tangent.shape[2], VECTORS)).astype(np.float32)
                whole, tangent = whole @ signs, tangent @ signs
            found.append(Comparison(whole, activation, tangent))
    return tuple(found[:COMPARED])


def common_factor(comparisons: Sequence[Comparison]) -> Float[Array, ""]:
    """The ratio of the norms of the given gradients and of those of the factors; one where they are not alike."""
    if not comparisons:
        return jnp.ones((), jnp.float32)
    made = [jnp.einsum("ksi,kso->kio", x.activation, x.tangent / x.tangent.shape[1]) for x in comparisons]
    (x, size), (y, other) = (
        _of_unit_size([c.gradient.ravel() for c in comparisons]),
        _of_unit_size([m.ravel() for m in made]),
    )
    xx, xy, yy = jnp.vdot(x, x), jnp.vdot(x, y), jnp.vdot(y, y)
    alike = xy**2 > ALIKE**2 * xx * yy
    return jnp.where(alike, jnp.sqrt(xx / jnp.where(alike, yy, 1.0)) * (size / other), 1.0)


def _of_unit_size(parts: Sequence[Float[Array, " _"]]) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """A vector divided by its largest entry, so that no square is too small or too large, and that entry."""
    whole = jnp.concatenate(parts)
    largest = jnp.maximum(jnp.abs(whole).max(initial=0.0), jnp.finfo(whole.dtype).tiny)
    return whole / largest, largest
