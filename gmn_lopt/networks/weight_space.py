"""What weight-space networks have in common: features of each parameter entry in, numbers for each entry out."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.networks.initialization import matrix

FIRST_OUTPUTS = 0.1  # scale of the last matrices at the start: changes start small, and those of several heads differ


class Embedding(nn.Module):
    """From the features of each entry to ``width`` features, by one affine map for each leaf of the parameters.

    The map's constant has a vector for each neuron of a fixed space, such as each input: what tells them apart. The
    neurons of a permutable space share one, so that their order does not matter.

    Attributes:
        structure: the structure of the model whose parameters are read.
        width: number of features.
    """

    structure: GradientStructure
    width: int

    @nn.compact
    def __call__(self, features: Sequence[Float[Array, "..."]]) -> list[Float[Array, "..."]]:
        """Compute the features ``[*cut_shape, width]`` of each leaf from features ``[*shape, channels]``."""
        outputs = []
        for i, (leaf, x) in enumerate(zip(self.structure.parameters, features, strict=True)):
            x = x.reshape(*leaf.cut_shape, x.shape[-1])
            permutable = [self.structure.spaces[space].permutable for space in leaf.spaces]
            sizes = [1 if free else size for free, size in zip(permutable, leaf.cut_shape)]
            constant = self.param(f"constant_{i}", nn.initializers.normal(0.5), (*sizes, self.width), jnp.float32)
            outputs.append(x @ matrix(self, f"kernel_{i}", x.shape[-1], self.width) + constant)
        return outputs


class Readout(nn.Module):
    """From features of each entry to ``outputs`` numbers, by one affine map for each leaf of the parameters.

    Attributes:
        structure: the structure of the model whose parameters are read.
        outputs: how many numbers for each entry.
    """

    structure: GradientStructure
    outputs: int

    @nn.compact
    def __call__(self, features: Sequence[Float[Array, "..."]]) -> tuple[Float[Array, "..."], ...]:
        """Compute the numbers ``[*shape, outputs]`` of each leaf from features ``[*cut_shape, width]``."""
        start = nn.initializers.variance_scaling(FIRST_OUTPUTS**2, "fan_in", "normal")
        found = []
        for i, (leaf, x) in enumerate(zip(self.structure.parameters, features, strict=True)):
            kernel = self.param(f"kernel_{i}", start, (x.shape[-1], self.outputs), jnp.float32)
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (self.outputs,), jnp.float32)
            found.append((x @ kernel + bias).reshape(*leaf.shape, self.outputs))
        return tuple(found)
