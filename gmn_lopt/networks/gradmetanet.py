"""GradMetaNet (arXiv:2507.01649, section 5): an equivariant network on sets of rank-1-decomposed gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gmn_lopt.factors.structure import Factors, GradientStructure, Site, SiteRef, Space
from gmn_lopt.networks.encoding import ENCODING_FEATURES, encode_sites
from gmn_lopt.networks.initialization import init_weights
from gmn_lopt.networks.site_features import (
    SLOTS,
    FactorFeatures,
    NeuronFeatures,
    SetGroup,
    group_sites,
    mean_over_copies,
)
from gmn_lopt.optimizers.features.paper import DECAYS


@dataclass(frozen=True)
class GradMetaNetConfig:
    """The architecture of GradMetaNet.

    Attributes:
        width: number of features per neuron in every layer.
        set_layers: number of layers on the set of gradients, before pooling over it; of GradMetaNet++, of blocks.
        neuron_layers: number of layers on the neurons, after pooling.
        product_width: width of the hidden layer of the product layer's perceptrons.
        out_features: number of features per parameter entry (of the invariant head: number of outputs).
        use_parameter: whether the product layer also reads the value of each parameter entry.
        max_set_size: in a learned optimizer, the largest number of set elements that are read, a random subset at each
            step (:mod:`gmn_lopt.optimizers.set_subset`); None: all.
        max_output_size: in a learned optimizer, the largest output (logits) that is read; a larger one is left out
            (:mod:`gmn_lopt.optimizers.output_sites`), and no moving averages are kept of it; None: all are read.
        factor_decays: in a learned optimizer, the decays of the moving averages of the factors, slot by slot of the
            set, that are read beside the current ones. Without any, ``()``, nothing is kept of a step's set but what
            the gradient's own averages hold.
        attention_heads: number of heads of GradMetaNet++, which attends over the set and the neurons in place of taking
            means (:mod:`gmn_lopt.networks.gradmetanet_pp`; without neuron layers); 0: GradMetaNet.
    """

    width: int = 32
    set_layers: int = 2
    neuron_layers: int = 1
    product_width: int = 32
    out_features: int = 14
    use_parameter: bool = False
    max_set_size: int | None = None
    max_output_size: int | None = 512
    factor_decays: tuple[float, ...] = DECAYS
    attention_heads: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.use_parameter, bool):
            raise ValueError(f"GradMetaNetConfig.use_parameter must be True or False, not {self.use_parameter!r}")
        if not all(0 <= decay < 1 for decay in self.factor_decays):
            raise ValueError(
                f"GradMetaNetConfig.factor_decays must be at least 0 and below 1, not {self.factor_decays}"
            )
        for name in [f.name for f in fields(self) if f.name not in ("use_parameter", "factor_decays")]:
            value, least = getattr(self, name), 0 if name in ("neuron_layers", "attention_heads") else 1
            if name in ("max_set_size", "max_output_size") and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"GradMetaNetConfig.{name} must be a whole number of at least {least}, not {value!r}")
        if self.attention_heads and self.width % self.attention_heads:
            raise ValueError(
                f"GradMetaNetConfig.attention_heads is {self.attention_heads}; it must divide the width, {self.width}"
            )


def matrix(module: nn.Module, name: str, rows: int, columns: int) -> jax.Array:
    """A LeCun-normal matrix among a module's parameters."""
    return module.param(name, nn.initializers.lecun_normal(), (rows, columns))


def vector(module: nn.Module, name: str, size: int) -> jax.Array:
    """A vector of zeros among a module's parameters."""
    return module.param(name, nn.initializers.zeros, (size,))


class SetLayer(nn.Module):
    """An interactions-across-sets layer (Hartford et al. 2018) with means for sums, and a ReLU.

    ``y = x M1 + (E_S x) M2 + (E_N x) M3 + (E_SN x) M4 + (E_C x) M5 + c``: means over the set, over the neurons of all
    sites that share the set, over everything (each neuron of the model counting the same, however large its set), and,
    where one space has several sites, over the copies of the same neuron.

    Positional encodings do not vary over the set, so concatenating them to ``x`` and adding ``p M1' + (E_N p) M3'`` to
    the bias is the same; their shares of ``M2`` and ``M4`` would repeat those two.

    Attributes:
        in_features: number of features of each neuron.
        out_features: number of features after the layer.
        encoding_features: size of the positional encodings; 0 for a layer without.
    """

    in_features: int
    out_features: int
    encoding_features: int = 0

    def setup(self) -> None:  # noqa: D102
        for name in ("own", "set_mean", "neuron_mean", "full_mean", "copies_mean"):
            setattr(self, f"m_{name}", matrix(self, name, self.in_features, self.out_features))
        if self.encoding_features:
            self.m_encoding = matrix(self, "encoding", self.encoding_features, self.out_features)
            self.m_encoding_mean = matrix(self, "encoding_mean", self.encoding_features, self.out_features)
        self.bias = vector(self, "bias", self.out_features)

    def __call__(
        self, inputs: Sequence[FactorFeatures | NeuronFeatures], encodings: Sequence[Float[Array, "_ p"]] | None = None
    ) -> list[NeuronFeatures]:
        """Apply the layer to the features of each group of sites (and its neurons' encodings, in the first layer)."""
        set_means = [x.set_mean() for x in inputs]
        shared = jnp.concatenate(set_means).mean(0) @ self.m_full_mean + self.bias
        outputs = []
        for i, (x, set_mean) in enumerate(zip(inputs, set_means)):
            # Terms that do not vary over the set, or over the neurons, are summed before they are broadcast.
            per_neuron = set_mean @ self.m_set_mean + shared
            if encodings is not None:
                p = encodings[i]
                per_neuron = per_neuron + p @ self.m_encoding + p.mean(0) @ self.m_encoding_mean
            per_element = x.neuron_mean() @ self.m_neuron_mean
            y = x.product(self.m_own) + per_neuron + per_element[:, None]
            copies = x.copies_product(self.m_copies_mean)
            outputs.append(x.after_layer(jax.nn.relu(y if copies is None else y + copies)))
        return outputs


class Trunk(nn.Module):
    """Steps 1 to 4: from sets of factors to one feature vector for each neuron.

    Attributes:
        structure: the structure of the model whose factors are read.
        config: the architecture.
        channels: number of channels of each activation and each tangent.
    """

    structure: GradientStructure
    config: GradMetaNetConfig
    channels: int = 1

    def setup(self) -> None:  # noqa: D102
        width = self.config.width
        first = SetLayer(SLOTS * self.channels, width, ENCODING_FEATURES)
        self.set_layers = [first] + [SetLayer(width, width) for _ in range(self.config.set_layers - 1)]
        for name in ("pool", "pool_full_mean"):
            setattr(self, f"m_{name}", matrix(self, name, width, width))
        self.pool_bias = vector(self, "pool_bias", width)
        names = ("own", "mean", "copies_mean")
        layers = range(self.config.neuron_layers)
        self.neuron_layers = [tuple(matrix(self, f"neuron_{i}_{n}", width, width) for n in names) for i in layers]
        self.neuron_biases = [vector(self, f"neuron_{i}_bias", width) for i in layers]

    def __call__(self, factors: Factors) -> tuple[Float[Array, "neurons width"], ...]:
        """Compute the features of all neurons.

        Args:
            factors: the factors with channels first: arrays ``[channels, S, d]``, the tangents at per-element scale.

        Returns:
            For each site of the structure, the features of its neurons.
        """
        groups = group_sites(self.structure)
        x: list = [FactorFeatures(self.structure, group, factors) for group in groups]
        encodings = encode_sites(self.structure)
        x = self.set_layers[0](x, [jnp.concatenate([encodings[s] for s in group.sites]) for group in groups])
        for layer in self.set_layers[1:]:
            x = layer(x)
        # The mean over the set comes before the linear map: they commute, and it leaves little to multiply.
        h = jnp.concatenate([features.set_mean() for features in x])
        h = jax.nn.relu(h @ self.m_pool + (h.mean(0) @ self.m_pool_full_mean + self.pool_bias))
        for (own, mean, copies), bias in zip(self.neuron_layers, self.neuron_biases):
            y = h @ own + (h.mean(0) @ mean + bias)
            h_copies = self._copies_mean(groups, h)
            h = jax.nn.relu(y if h_copies is None else y + h_copies @ copies)
        return tuple(self._split(groups, h))

    def _split(self, groups: Sequence[SetGroup], h: jax.Array) -> list[jax.Array]:
        """Cut the array of all neurons into the sites, in the structure's order."""
        order = [s for group in groups for s in group.sites]
        sizes = [self.structure.sites[s].size for s in order]
        pieces = dict(zip(order, jnp.split(h, [sum(sizes[:i]) for i in range(1, len(sizes))])))
        return [pieces[s] for s in range(len(self.structure.sites))]

    def _copies_mean(self, groups: Sequence[SetGroup], h: jax.Array) -> jax.Array | None:
        sites = self._split(groups, h)
        means = mean_over_copies(self.structure, range(len(sites)), sites, axis=0)
        if all(m is None for m in means):
            return None
        filled = [jnp.zeros_like(h) if m is None else m for h, m in zip(sites, means)]
        return jnp.concatenate([filled[s] for group in groups for s in group.sites])


class ProductLayer(nn.Module):
    """Step 5: from neurons to parameters, by one perceptron for each number of axes that have a site.

    The first layer of a kernel's perceptron acts on ``[h_i, h_j]``; it is the outer sum ``h_i A + h_j B + c``.

    Attributes:
        structure: the structure of the model.
        config: the architecture.
    """

    structure: GradientStructure
    config: GradMetaNetConfig

    def setup(self) -> None:  # noqa: D102
        c = self.config
        for axes, inputs in ((1, ("write",)), (2, ("read", "write"))):
            kernels = {name: matrix(self, f"axes{axes}_{name}", c.width, c.product_width) for name in inputs}
            if c.use_parameter:
                kernels["parameter"] = matrix(self, f"axes{axes}_parameter", 1, c.product_width)
            bias = vector(self, f"axes{axes}_bias", c.product_width)
            out = matrix(self, f"axes{axes}_out", c.product_width, c.out_features)
            out_bias = vector(self, f"axes{axes}_out_bias", c.out_features)
            setattr(self, f"mlp_{axes}", (kernels, bias, out, out_bias))

    def __call__(
        self, neurons: Sequence[Float[Array, "_ width"]], parameters: Sequence[Array] | None = None
    ) -> tuple[Float[Array, "..."] | None, ...]:
        """Compute the features of all parameter entries.

        Args:
            neurons: the features of the neurons of each site.
            parameters: the values of the leaves, needed with ``config.use_parameter`` only.

        Returns:
            For each parameter of the structure an array ``[*shape, out_features]``; None for one without a site.
        """
        self.check_values(parameters)
        hidden = [self.hidden(i, neurons, parameters) for i in range(len(self.structure.parameters))]
        return tuple(None if h is None else self.output(i, h) for i, h in enumerate(hidden))

    def check_values(self, parameters: Sequence[Array] | None) -> None:
        """Raise an error where values of the leaves are needed and not given."""
        if self.config.use_parameter and parameters is None:
            raise ValueError("GradMetaNetConfig.use_parameter is set: call with the values of the parameters")

    def hidden(
        self, index: int, neurons: Sequence[Float[Array, "_ width"]], parameters: Sequence[Array] | None
    ) -> Float[Array, "... hidden"] | None:
        """The hidden layer of one leaf, along the dimensions of its cut shape or 1; None for one without a site."""
        parameter = self.structure.parameters[index]
        if not parameter.sites:
            return None
        kernels, bias, *_ = self.mlp_1 if len(parameter.sites) == 1 else self.mlp_2
        roles = ("write",) if len(parameter.sites) == 1 else ("read", "write")
        hidden = bias
        for role, ref in zip(roles, parameter.sites):
            hidden = hidden + self._place(neurons[ref.site] @ kernels[role], ref, len(parameter.cut_shape))
        if self.config.use_parameter and parameters is not None:
            hidden = hidden + parameters[index].reshape(*parameter.cut_shape, 1) @ kernels["parameter"]
        return jax.nn.relu(hidden)

    def output(self, index: int, hidden: Float[Array, "... hidden"]) -> Float[Array, "... out_features"]:
        """The features of one leaf from its hidden layer."""
        parameter = self.structure.parameters[index]
        _, _, out, out_bias = self.mlp_1 if len(parameter.sites) == 1 else self.mlp_2
        y = hidden @ out + out_bias
        y = jnp.broadcast_to(y, (*parameter.cut_shape, y.shape[-1]))
        return y.reshape(*parameter.shape, y.shape[-1])

    def _place(self, values: jax.Array, ref: SiteRef, dims: int) -> jax.Array:
        """Lay a site's neurons ``[d, f]`` along their dimensions of a parameter: ``[1 or d, ..., f]``."""
        sizes = [self.structure.spaces[space].size for space in self.structure.sites[ref.site].spaces]
        order = sorted(range(len(sizes)), key=lambda i: ref.dims[i])
        values = values.reshape(*sizes, -1).transpose(*order, len(sizes))
        shape = [1] * dims
        for dim, size in zip(ref.dims, sizes):
            shape[dim] = size
        return values.reshape(*shape, values.shape[-1])


def _steps(config: GradMetaNetConfig) -> tuple[Any, Any]:
    """The modules of steps 1 to 4 and of step 5: GradMetaNet's or GradMetaNet++'s."""
    if not config.attention_heads:
        return Trunk, ProductLayer
    from gmn_lopt.networks.gradmetanet_pp import AttentionTrunk, SetProductLayer  # which build on this file

    return AttentionTrunk, SetProductLayer


class GradMetaNet(nn.Module):
    """GradMetaNet with one feature vector for each parameter entry as its output (steps 1 to 5).

    Invariant to the order of the set and equivariant to permutations of each permutable neuron space. Its weights do
    not depend on widths, depth or set size.

    Attributes:
        structure: the structure of the model whose factors are read.
        config: the architecture.
        channels: number of channels of each activation and each tangent.
    """

    structure: GradientStructure
    config: GradMetaNetConfig = GradMetaNetConfig()
    channels: int = 1

    def setup(self) -> None:  # noqa: D102
        trunk, product = _steps(self.config)
        self.trunk = trunk(self.structure, self.config, self.channels)
        self.product = product(self.structure, self.config)

    def __call__(
        self, factors: Factors, parameters: Sequence[Array] | None = None
    ) -> tuple[Float[Array, "..."] | None, ...]:
        """Compute the features of all parameter entries.

        Args:
            factors: the factors with channels first: arrays ``[channels, S, d]``, the tangents at per-element scale
                (``S`` times those of the batch loss).
            parameters: the values of the leaves, needed with ``config.use_parameter`` only.

        Returns:
            For each parameter of the structure an array ``[*shape, out_features]``; None for one without a site.
        """
        return self.product(self.trunk(factors), parameters)


class InvariantGradMetaNet(nn.Module):
    """GradMetaNet with one vector for the whole model as its output: steps 1 to 4, then ``(E_N h) M + c``.

    Attributes:
        structure: the structure of the model whose factors are read.
        config: the architecture.
        channels: number of channels of each activation and each tangent.
    """

    structure: GradientStructure
    config: GradMetaNetConfig = GradMetaNetConfig()
    channels: int = 1

    def setup(self) -> None:  # noqa: D102
        trunk, _ = _steps(self.config)
        self.trunk = trunk(self.structure, self.config, self.channels)
        self.head = nn.Dense(self.config.out_features)

    def __call__(self, factors: Factors) -> Float[Array, "out"]:
        """Compute the vector (``factors`` as for :class:`GradMetaNet`)."""
        sites = self.trunk(factors)
        if self.config.attention_heads:
            sites = tuple(x.mean(0) for x in sites)
        return self.head(jnp.concatenate(sites).mean(0))


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


def init_gradmetanet(module: GradMetaNet | InvariantGradMetaNet, key: jax.Array) -> PyTree:
    """Draw the weights of a module; they do not depend on its structure.

    Returns:
        Its parameters: ``module.apply({"params": weights}, factors)``.
    """

    def init(key: jax.Array, channels: Float[Array, "channels 1 1"]) -> Any:
        rest = () if isinstance(module, InvariantGradMetaNet) else ((),)
        return module.clone(structure=_ONE_NEURON).init(key, Factors((channels,), (channels,)), *rest)

    return init_weights(init, key, jax.ShapeDtypeStruct((module.channels, 1, 1), jnp.float32))
