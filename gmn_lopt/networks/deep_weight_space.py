"""Deep weight-space networks (Navon et al. 2023, arXiv:2301.12780): equivariant linear layers, one on the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.networks.gradmetanet_pp import normalize
from gmn_lopt.networks.unf import EquivariantLinear
from gmn_lopt.networks.weight_space import Embedding, Readout
from gmn_lopt.util.checks import whole


@dataclass(frozen=True)
class DeepWeightSpace:
    """A network on the parameters of a model that commutes with permutations of its neurons.

    Its layers are the most general affine maps that do, :class:`~gmn_lopt.networks.unf.EquivariantLinear`; in front of
    the first one each fixed neuron gets a vector of its own. **Choice**: ``x + layer(relu(normalize(x)))``, a residual
    form, which trains at every depth.

    Attributes:
        width: number of features of each parameter entry.
        layers: number of layers.

    Raises:
        ValueError: a size is impossible.

    Example:
        >>> loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"]) ** 2)
        >>> params = {"v": jnp.ones((3, 4)), "w": jnp.ones((2, 3))}
        >>> module = DeepWeightSpace(8, 2).module(gmn_lopt.analyze(loss, params, jnp.ones((5, 2))), outputs=1)
        >>> features = [params["v"][..., None], params["w"][..., None]]
        >>> outputs = module.apply(module.init(jax.random.key(0), features), features)
        >>> [y.shape for y in outputs]
        [(3, 4, 1), (2, 3, 1)]
    """

    width: int = 32
    layers: int = 4

    def __post_init__(self) -> None:
        whole(self, "width")
        whole(self, "layers", most=64)

    def module(self, structure: GradientStructure, outputs: int) -> "DeepWeightSpaceModule":
        """The network for a model, with so many outputs for each parameter entry."""
        return DeepWeightSpaceModule(structure, self, outputs)


class DeepWeightSpaceModule(nn.Module):
    """The flax module of :class:`DeepWeightSpace`."""

    structure: GradientStructure
    config: DeepWeightSpace
    outputs: int

    @nn.compact
    def __call__(self, features: Sequence[Float[Array, "..."]]) -> tuple[Float[Array, "..."], ...]:
        """From features ``[*shape, channels]`` of each leaf to outputs ``[*shape, outputs]``.

        The number of channels may differ from leaf to leaf.
        """
        width, leaves = self.config.width, self.structure.parameters
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

        def per_leaf(x: Array) -> list[Array]:
            pieces = jnp.split(jax.nn.relu(normalize(x)), ends)
            return [piece.reshape(*leaf.cut_shape, width) for leaf, piece in zip(leaves, pieces)]

        def together(values: Sequence[Array | None]) -> Array:
            return jnp.concatenate([x.reshape(-1, width) for x in values if x is not None])

        # All entries are one array between layers: what is done to each of them compiles once.
        x = together(Embedding(self.structure, width, name="embedding")(features))
        for i in range(self.config.layers):
            layer = EquivariantLinear(tuple(leaf.spaces for leaf in leaves), width, width, name=f"layers_{i}")
            x = x + together(layer(per_leaf(x)))
        return Readout(self.structure, self.outputs, name="readout")(per_leaf(x))
