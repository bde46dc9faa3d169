"""GradMetaNet (arXiv:2507.01649, section 5): an equivariant network on sets of rank-1-decomposed gradients.

These are its steps, and where they are done. ``x`` are the features of a neuron at an element of the set, ``h`` those
of a neuron, ``p`` its positional encoding. ``E_S``, ``E_N`` and ``E_SN`` are means over the set, over the neurons and
over both, ``E_C`` is the mean over the copies of one neuron, and matrices ``M`` and vectors ``c`` are weights.

0. *Input*: activations and tangents as channels, ``x / sqrt(E_SN x^2 + 1e-5)`` for each channel of each site:
   :class:`~gmn_lopt.networks.site_features.FactorFeatures`.
1. *Positional encoding* (section 5 and the appendix on implementation), ``[x, p]``:
   :func:`~gmn_lopt.networks.encoding.encode_sites`, read by the first :class:`SetLayer`.
2. *Set layers* (section 5; interactions across sets, Hartford et al. 2018):
   ``relu(x M1 + (E_S x) M2 + (E_N x) M3 + (E_SN x) M4 + (E_C x) M5 + c)``: :class:`SetLayer`.
3. *Pooling over the set* (section 5), ``h = relu((E_S x) M1 + (E_SN x) M2 + c)``: :class:`Trunk`.
4. *Neuron layers* (section 5; DeepSets, Zaheer et al. 2017), ``relu(h M1 + (E_N h) M2 + (E_C h) M3 + c)``:
   :class:`Trunk`.
5. *Product layer* (section 5), ``MLP_2([h_i, h_j])`` for the entry of a kernel between neurons ``i`` and ``j``, and
   ``MLP_1(h_j)`` for that of a bias: :class:`~gmn_lopt.networks.product_layer.ProductLayer`. For one vector in place of
   features of entries, ``(E_N h) M + c``: :class:`~gmn_lopt.networks.invariant.InvariantGradMetaNet`.

GradMetaNet++ has attention in place of steps 2 to 4, and takes step 5 at each element of the set:
:mod:`gmn_lopt.networks.gradmetanet_pp`.

Our choices, where the paper leaves them open: means for sums, so that no size matters; the division of step 0; and the
mean over copies, which tells the network that several sites of one space (a residual stream) hold the same neurons. It
vanishes in models without such spaces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gmn_lopt.factors.structure import Factors, GradientStructure, Site, Space
from gmn_lopt.networks.initialization import init_weights, matrix, vector
from gmn_lopt.networks.product_layer import ProductLayer
from gmn_lopt.networks.site_features import SLOTS, FactorFeatures, NeuronFeatures, group_sites, mean_over_copies
from gmn_lopt.util.checks import whole


@dataclass(frozen=True)
class GradMetaNetConfig:
    """The architecture of GradMetaNet.

    Attributes:
        width: number of features of each neuron in every layer.
        set_layers: number of layers on the set of gradients (step 2 of :mod:`gmn_lopt.networks.gradmetanet`).
        neuron_layers: number of layers on the neurons (step 4).
        product_width: width of the hidden layer of the product layer's perceptrons (step 5).
        out_features: number of features of each parameter entry (of the invariant head: number of outputs).

    Raises:
        ValueError: a size is impossible.

    Example:
        >>> GradMetaNetConfig(set_layers=0)
        Traceback (most recent call last):
        ValueError: GradMetaNetConfig.set_layers must be a whole number of at least 1 and at most 64, not 0
    """

    width: int = 32
    set_layers: int = 2
    neuron_layers: int = 1
    product_width: int = 32
    out_features: int = 14

    def __post_init__(self) -> None:
        whole(self, "width", "product_width", "out_features")
        whole(self, "set_layers", most=64)
        whole(self, "neuron_layers", least=0, most=64)

    def module(self, structure: GradientStructure, channels: int = 1) -> "GradMetaNet":
        """The network for a model whose factors have so many channels."""
        return GradMetaNet(structure, self, channels)

    @property
    def trunk(self) -> "type[Trunk]":
        """The flax module of steps 0 to 4."""
        return Trunk

    @property
    def product_layer(self) -> type[ProductLayer]:
        """That of step 5."""
        return ProductLayer


class SetLayer(nn.Module):
    """Step 2 of :mod:`gmn_lopt.networks.gradmetanet`, and in the first layer step 1.

    ``E_N`` is the mean over the neurons of all sites that share the set. In ``E_SN`` each neuron of the model counts
    the same, however large its set.

    Positional encodings do not vary over the set, so concatenating them to ``x`` and adding ``p M1' + (E_N p) M3'`` to
    the bias is the same; their shares of ``M2`` and ``M4`` would repeat those two.
    """

    in_features: int
    out_features: int

    @nn.compact
    def __call__(
        self, inputs: Sequence[FactorFeatures | NeuronFeatures], encodings: Sequence[Float[Array, "_ p"]] | None = None
    ) -> list[NeuronFeatures]:
        """Apply the layer to the features of each group of sites (and its neurons' encodings, in the first layer)."""
        size = self.in_features, self.out_features
        names = ("own", "set_mean", "neuron_mean", "full_mean", "copies_mean")
        m_own, m_set, m_neurons, m_full, m_copies = (matrix(self, name, *size) for name in names)
        set_means = [x.set_mean() for x in inputs]
        shared = jnp.concatenate(set_means).mean(0) @ m_full + vector(self, "bias", self.out_features)
        # Terms that do not vary over the set, or over the neurons, are summed before they are broadcast.
        per_neuron = [set_mean @ m_set + shared for set_mean in set_means]
        if encodings is not None:
            size = encodings[0].shape[1], self.out_features
            m_encoding, m_mean = (matrix(self, name, *size) for name in ("encoding", "encoding_mean"))
            per_neuron = [x + p @ m_encoding + p.mean(0) @ m_mean for x, p in zip(per_neuron, encodings)]
        outputs = []
        for x, of_neurons in zip(inputs, per_neuron):
            y = x.product(m_own) + of_neurons + (x.neuron_mean() @ m_neurons)[:, None]
            outputs.append(x.after_layer(jax.nn.relu(x.add_copies(y, m_copies))))
        return outputs


class Trunk(nn.Module):
    """Steps 0 to 4 of :mod:`gmn_lopt.networks.gradmetanet`: from sets of factors to a feature vector for each neuron.

    Attributes are as for :class:`GradMetaNet`.
    """

    structure: GradientStructure
    config: GradMetaNetConfig
    channels: int = 1
    normalize: bool = True

    @nn.compact
    def __call__(self, factors: Factors) -> tuple[Float[Array, "neurons width"], ...]:
        """Compute the features of the neurons of each site (``factors`` as for :class:`GradMetaNet`)."""
        width, groups = self.config.width, group_sites(self.structure)
        x: list = [FactorFeatures(self.structure, group, factors, self.normalize) for group in groups]
        encodings = [group.encodings(self.structure) for group in groups]
        for i in range(self.config.set_layers):
            size = SLOTS * self.channels if i == 0 else width
            x = SetLayer(size, width, name=f"set_layers_{i}")(x, encodings if i == 0 else None)
        # Step 3. The mean over the set comes before the linear map: they commute, and it leaves little to multiply.
        h = jnp.concatenate([features.set_mean() for features in x])
        h = jax.nn.relu(self._layer("pool", "pool_full_mean", "pool_bias", h))
        order = [s for group in groups for s in group.sites]  # of the neurons in h
        # Step 4.
        for i in range(self.config.neuron_layers):
            y = self._layer(f"neuron_{i}_own", f"neuron_{i}_mean", f"neuron_{i}_bias", h)
            m_copies = matrix(self, f"neuron_{i}_copies_mean", width, width)
            sites = self._split(order, h)
            means = mean_over_copies(self.structure, range(len(sites)), sites, axis=0)
            if any(mean is not None for mean in means):
                filled = [jnp.zeros_like(own) if mean is None else mean for own, mean in zip(sites, means)]
                y = y + jnp.concatenate([filled[s] for s in order]) @ m_copies
            h = jax.nn.relu(y)
        return tuple(self._split(order, h))

    def _layer(self, own: str, mean: str, bias: str, h: Float[Array, "neurons width"]) -> Float[Array, "neurons width"]:
        """``h M1 + (E_N h) M2 + c``, with the weights of these names."""
        m_own, m_mean = (matrix(self, name, h.shape[1], h.shape[1]) for name in (own, mean))
        return h @ m_own + (h.mean(0) @ m_mean + vector(self, bias, h.shape[1]))

    def _split(self, order: Sequence[int], h: Float[Array, "neurons width"]) -> list[Float[Array, "_ width"]]:
        """Cut the array of all neurons, whose sites lie in this order, into the sites in the structure's order."""
        pieces = jnp.split(h, np.cumsum([self.structure.sites[s].size for s in order])[:-1])
        return [piece for _, piece in sorted(zip(order, pieces), key=lambda pair: pair[0])]


class GradMetaNet(nn.Module):
    """GradMetaNet: from sets of factors to one feature vector for each parameter entry.

    The steps are those of :mod:`gmn_lopt.networks.gradmetanet` (arXiv:2507.01649, section 5). The network is invariant
    to the order of the set and equivariant to permutations of each permutable neuron space. Its weights do not depend
    on widths, depth or set size.

    Attributes:
        structure: the structure of the model whose factors are read.
        config: the architecture.
        channels: number of channels of each activation and each tangent.
        normalize: whether the channels are normalised (step 0). Where the size of gradients matters, as for curvature,
            they are not; what is read is then standardised before (:func:`gmn_lopt.fit_standardization`).

    Example:
        >>> import gmn_lopt
        >>> loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"]) ** 2)
        >>> params, x = {"v": jnp.ones((3, 1)), "w": jnp.ones((2, 3))}, jnp.ones((8, 2))
        >>> module = GradMetaNet(gmn_lopt.analyze(loss, params, x), GradMetaNetConfig(width=8))
        >>> weights = init_gradmetanet(module, jax.random.key(0))
        >>> _, _, factors = gmn_lopt.value_grad_and_factors(loss)(params, x)
        >>> activations = tuple(a[None] for a in factors.activations)  # one channel
        >>> tangents = tuple(len(g) * g[None] for g in factors.tangents)
        >>> features = module.apply({"params": weights}, gmn_lopt.Factors(activations, tangents))
        >>> [f.shape for f in features]
        [(3, 1, 14), (2, 3, 14)]
    """

    structure: GradientStructure
    config: GradMetaNetConfig = GradMetaNetConfig()
    channels: int = 1
    normalize: bool = True

    @nn.compact
    def __call__(self, factors: Factors) -> tuple[Float[Array, "..."] | None, ...]:
        """Compute the features of all parameter entries.

        Args:
            factors: the factors with channels first: arrays ``[channels, S, d]``, the tangents at per-element scale
                (``S`` times those of the batch loss).

        Returns:
            For each parameter of the structure an array ``[*shape, out_features]``; None for one without a site.
        """
        c = self.config
        product = c.product_layer(self.structure, c.width, c.product_width, c.out_features, name="product")
        return product(c.trunk(self.structure, c, self.channels, self.normalize, name="trunk")(factors))


# Weights do not depend on the model, so they are drawn for the smallest one: a single neuron.
_ONE_NEURON = GradientStructure(
    spaces=(Space(1, True),),
    sites=(Site(spaces=(0,), size=1, set_size=1, set_axes=(0,), activation=0, tangent=0),),
    parameters=(),
    layers=(),
    treedef=jax.tree.structure(()),
    activation_shapes=((1, 1),),
    tangent_shapes=((1, 1),),
)


def init_gradmetanet(module: Any, key: jax.Array) -> PyTree:
    """Draw the weights of a GradMetaNet, GradMetaNet++ or InvariantGradMetaNet; they do not depend on its structure.

    Args:
        module: the flax module.
        key: a random key.

    Returns:
        Its parameters: ``module.apply({"params": weights}, factors)``.

    Example:
        >>> sorted(init_gradmetanet(GradMetaNet(_ONE_NEURON), jax.random.key(0)))
        ['product', 'trunk']
    """

    def init(key: jax.Array, channels: Float[Array, "channels 1 1"]) -> Any:
        return module.clone(structure=_ONE_NEURON).init(key, Factors((channels,), (channels,)))

    return init_weights(init, key, jax.ShapeDtypeStruct((module.channels, 1, 1), jnp.float32))
