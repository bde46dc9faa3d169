"""GradMetaNet++ (arXiv:2507.01649, section 5): attention over the set and over the neurons in place of means.

Its steps, where they differ from those listed in :mod:`gmn_lopt.networks.gradmetanet`:

- 1, ``x M + p M' + c``, and 2 to 4, blocks of attention without pooling: :class:`AttentionTrunk`, :class:`Block`;
- 5 at each element of the set, then the mean over the set: :class:`SetProductLayer`.

Time grows as ``(N^2 S + S^2 N) width``, memory as ``N S width`` for ``N`` neurons and a set of ``S``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmn_lopt.factors.structure import Factors, GradientStructure
from gmn_lopt.networks.attention import attention
from gmn_lopt.networks.encoding import ENCODING_FEATURES
from gmn_lopt.networks.gradmetanet import GradMetaNet
from gmn_lopt.networks.initialization import matrix, vector
from gmn_lopt.networks.product_layer import ProductLayer
from gmn_lopt.networks.site_features import SLOTS, FactorFeatures, NeuronFeatures, group_sites
from gmn_lopt.util.checks import whole

EPSILON = 1e-6


@dataclass(frozen=True)
class GradMetaNetPlusPlusConfig:
    """The architecture of GradMetaNet++.

    Attributes:
        width: number of features of each neuron in every layer.
        blocks: number of blocks of attention.
        heads: number of heads of the attention, a divisor of the width.
        product_width: width of the hidden layer of the product layer's perceptrons.
        out_features: number of features of each parameter entry (of the invariant head: number of outputs).

    Raises:
        ValueError: a size is impossible.

    Example:
        >>> GradMetaNetPlusPlusConfig(heads=5)
        Traceback (most recent call last):
        ValueError: GradMetaNetPlusPlusConfig.heads is 5; it must divide the width, 32
    """

    width: int = 32
    blocks: int = 2
    heads: int = 4
    product_width: int = 32
    out_features: int = 14

    def __post_init__(self) -> None:
        whole(self, "width", "heads", "product_width", "out_features")
        whole(self, "blocks", most=64)
        if self.width % self.heads:
            raise ValueError(f"GradMetaNetPlusPlusConfig.heads is {self.heads}; it must divide the width, {self.width}")

    def module(self, structure: GradientStructure, channels: int = 1) -> "GradMetaNetPlusPlus":
        """The network for a model whose factors have so many channels."""
        return GradMetaNetPlusPlus(structure, self, channels)

    @property
    def trunk(self) -> "type[AttentionTrunk]":
        """The flax module of steps 0 to 4."""
        return AttentionTrunk

    @property
    def product_layer(self) -> "type[SetProductLayer]":
        """That of step 5."""
        return SetProductLayer


def normalize(x: Float[Array, "... width"]) -> Float[Array, "... width"]:
    """LayerNorm without scale and shift: a linear map with a bias follows it wherever it is used."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + EPSILON)


class SelfAttention(nn.Module):
    """Multi-head attention over the second axis, with its LayerNorm before and its residual."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch n width"]) -> Float[Array, "batch n width"]:
        """Apply the attention, to each entry of the batch by itself."""
        names = ("query", "key", "value", "out")
        *kernels, out = (matrix(self, name, self.width, self.width) for name in names)
        *biases, out_bias = (vector(self, f"{name}_bias", self.width) for name in names)
        normal = normalize(x)
        heads = (*x.shape[:2], self.heads, self.width // self.heads)
        q, k, v = ((normal @ m + b).reshape(heads) for m, b in zip(kernels, biases))
        return x + attention(q, k, v).reshape(x.shape) @ out + out_bias


class Block(nn.Module):
    """Attention over the set for each neuron, over the neurons for each set element, then a pointwise perceptron.

    Each has a LayerNorm before it and a residual around it. Where a neuron has several sites, the perceptron also reads
    the mean over them, as in GradMetaNet's set layers: nothing else tells that they are the same neuron.
    """

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: NeuronFeatures) -> NeuronFeatures:
        """Apply the block to the features of one group of sites."""
        m_own, m_copies, m_out = (matrix(self, name, self.width, self.width) for name in ("own", "copies_mean", "out"))
        bias, out_bias = (vector(self, name, self.width) for name in ("bias", "out_bias"))
        values = SelfAttention(self.width, self.heads, name="over_set")(x.values.swapaxes(0, 1)).swapaxes(0, 1)
        values = SelfAttention(self.width, self.heads, name="over_neurons")(values)
        normal = x.after_layer(normalize(values))
        hidden = jax.nn.relu(normal.add_copies(normal.product(m_own) + bias, m_copies))
        return x.after_layer(values + x.after_layer(hidden).product(m_out) + out_bias)


class AttentionTrunk(nn.Module):
    """From sets of factors to one feature vector for each neuron and each set element.

    Sites that do not share their set (tokens before a pooling, examples after it) do not attend to one another.
    Attributes are as for :class:`GradMetaNetPlusPlus`.
    """

    structure: GradientStructure
    config: GradMetaNetPlusPlusConfig
    channels: int = 1
    normalize: bool = True

    @nn.compact
    def __call__(self, factors: Factors) -> tuple[Float[Array, "S neurons width"], ...]:
        """Compute the features of all neurons, for each element of the set (``factors`` as for ``GradMetaNet``)."""
        width = self.config.width
        m_own = matrix(self, "own", SLOTS * self.channels, width)
        m_encoding = matrix(self, "encoding", ENCODING_FEATURES, width)
        bias = vector(self, "bias", width)
        blocks = [Block(width, self.config.heads, name=f"blocks_{i}") for i in range(self.config.blocks)]
        sites: dict[int, jax.Array] = {}
        for group in group_sites(self.structure):
            read = FactorFeatures(self.structure, group, factors, self.normalize)
            x = read.after_layer(read.product(m_own) + (group.encodings(self.structure) @ m_encoding + bias))
            for block in blocks:
                x = block(x)
            sites.update(zip(group.sites, x.after_layer(normalize(x.values)).per_site()))
        return tuple(sites[s] for s in range(len(self.structure.sites)))


class SetProductLayer(ProductLayer):
    """The product layer for each element of the set, averaged over the set.

    One element is handled at a time, so the memory is that of the product layer. A parameter whose two sites do not
    share their set gets the product of the means over each.
    """

    def __call__(self, neurons: Sequence[Float[Array, "_ _ width"]]) -> tuple[Float[Array, "..."] | None, ...]:
        """Compute the features of all parameter entries (see :class:`ProductLayer`)."""
        groups = group_sites(self.structure)
        group_of = {site: g for g, group in enumerate(groups) for site in group.sites}
        leaves = self.structure.parameters
        sets = [{group_of[ref.site] for ref in p.sites} for p in leaves]
        means = [x.mean(0) for x in neurons]
        hidden = [self.hidden(i, means) if len(sets[i]) > 1 else None for i in range(len(leaves))]
        for g, group in enumerate(groups):
            mine = [i for i in range(len(leaves)) if sets[i] == {g}]
            if not mine:
                continue

            @jax.checkpoint
            def of_element(
                features: list[jax.Array], mine: list[int] = mine, sites: tuple[int, ...] = group.sites
            ) -> list[jax.Array]:
                placed = list(means)
                for site, x in zip(sites, features):
                    placed[site] = x
                return [h for i in mine if (h := self.hidden(i, placed)) is not None]

            def add(total: list[jax.Array], features: list[jax.Array]) -> tuple[list[jax.Array], None]:
                return jax.tree.map(jnp.add, total, of_element(features)), None

            features = [neurons[s] for s in group.sites]
            shapes = jax.eval_shape(of_element, [x[0] for x in features])
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            totals = jax.lax.scan(add, zeros, features)[0]
            for i, total in zip(mine, totals):
                hidden[i] = total / len(features[0])  # a learned optimizer may read a subset of the set
        return tuple(None if h is None else self.output(i, h) for i, h in enumerate(hidden))


class GradMetaNetPlusPlus(GradMetaNet):
    """GradMetaNet++: used as :class:`~gmn_lopt.networks.gradmetanet.GradMetaNet`, with the same symmetries.

    Attributes:
        structure, channels, normalize: see there.
        config: the architecture.

    Example:
        >>> import gmn_lopt
        >>> structure = gmn_lopt.analyze(lambda w, x: jnp.sum((x @ w) ** 2), jnp.ones((2, 3)), jnp.ones((4, 2)))
        >>> module = GradMetaNetPlusPlusConfig(width=8, out_features=5).module(structure, channels=1)
        >>> factors = Factors((jnp.ones((1, 4, 2)),), (jnp.ones((1, 4, 3)),))
        >>> [f.shape for f in module.apply(module.init(jax.random.key(0), factors), factors)]
        [(2, 3, 5)]
    """

    config: GradMetaNetPlusPlusConfig = GradMetaNetPlusPlusConfig()  # type: ignore[assignment]
