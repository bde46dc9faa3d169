"""The product layer: from features of neurons to features of parameter entries."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmn_lopt.factors.spaces import SiteRef
from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.networks.encoding import encode_window
from gmn_lopt.networks.initialization import matrix, vector

# What the neurons of a parameter are to it, by the number of its axes that have a site.
ROLES = {1: ("write",), 2: ("read", "write")}


class ProductLayer(nn.Module):
    """Step 5 of :mod:`gmn_lopt.networks.gradmetanet`: one perceptron for each number of axes that have a site.

    The first layer of a kernel's perceptron acts on ``[h_i, h_j]``; it is the outer sum ``h_i A + h_j B + c``, so that
    the concatenation is never built. At each position of a convolution's window ``h_i`` is ``h_i + p``, with an
    encoding ``p`` of that position (:func:`~gmn_lopt.networks.encoding.encode_window`).

    Attributes:
        structure: the structure of the model.
        width: number of features of each neuron.
        product_width: width of the perceptrons' hidden layer.
        out_features: number of features of each parameter entry.
    """

    structure: GradientStructure
    width: int
    product_width: int
    out_features: int

    def setup(self) -> None:  # noqa: D102
        for axes, roles in ROLES.items():
            kernels = [matrix(self, f"axes{axes}_{role}", self.width, self.product_width) for role in roles]
            bias = vector(self, f"axes{axes}_bias", self.product_width)
            out = matrix(self, f"axes{axes}_out", self.product_width, self.out_features)
            setattr(self, f"mlp_{axes}", (kernels, bias, out, vector(self, f"axes{axes}_out_bias", self.out_features)))

    def __call__(self, neurons: Sequence[Float[Array, "_ width"]]) -> tuple[Float[Array, "..."] | None, ...]:
        """Compute the features of all parameter entries, ``[*shape, out_features]`` of each parameter.

        Of a parameter without a site they are None.
        """
        hidden = [self.hidden(i, neurons) for i in range(len(self.structure.parameters))]
        return tuple(None if h is None else self.output(i, h) for i, h in enumerate(hidden))

    def hidden(self, index: int, neurons: Sequence[Float[Array, "_ width"]]) -> Float[Array, "... hidden"] | None:
        """The hidden layer of one leaf, along the dimensions of its cut shape or 1; None for one without a site."""
        parameter = self.structure.parameters[index]
        if not parameter.sites:
            return None
        kernels, hidden, *_ = self._mlp(index)
        for kernel, ref in zip(kernels, parameter.sites):
            hidden = hidden + self._place(neurons[ref.site] @ kernel, ref, len(parameter.cut_shape))
        if parameter.positions:
            hidden = hidden + encode_window(parameter, self.width) @ kernels[0]
        return jax.nn.relu(hidden)

    def output(self, index: int, hidden: Float[Array, "... hidden"]) -> Float[Array, "... out_features"]:
        """The features of one leaf from its hidden layer."""
        parameter = self.structure.parameters[index]
        _, _, out, out_bias = self._mlp(index)
        y = jnp.broadcast_to(hidden @ out + out_bias, (*parameter.cut_shape, self.out_features))
        return y.reshape(*parameter.shape, self.out_features)

    def _mlp(self, index: int) -> tuple:
        return self.mlp_1 if len(self.structure.parameters[index].sites) == 1 else self.mlp_2

    def _place(self, values: jax.Array, ref: SiteRef, dims: int) -> jax.Array:
        """Lay a site's neurons ``[d, f]`` along their dimensions of a parameter: ``[1 or d, ..., f]``."""
        sizes = [self.structure.spaces[space].size for space in self.structure.sites[ref.site].spaces]
        order = sorted(range(len(sizes)), key=lambda i: ref.dims[i])
        values = values.reshape(*sizes, -1).transpose(*order, len(sizes))
        shape = [1] * dims
        for dim, size in zip(ref.dims, sizes):
            shape[dim] = size
        return values.reshape(*shape, values.shape[-1])
