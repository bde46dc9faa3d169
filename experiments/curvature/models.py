"""The methods: from the gradients of one network to the diagonal of its Fisher matrix, in units of the target.

Each is a frozen dataclass with ``module(structure)``, a flax module on :class:`Inputs` of one network that returns one
number for each parameter entry, ``[P]``. To try another, copy one and add it to :data:`MODELS`. Sizes are such that
about 15,000 weights do something in a network with layers of 32, as in the paper, where the input is not too large.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import gmn_lopt
from gmn_lopt.networks import EquivariantLinear
from gmn_lopt.networks.encoding import encode_sites
from gmn_lopt.networks.gradmetanet_pp import SelfAttention, normalize
from gmn_lopt.networks.product_layer import ProductLayer


class Inputs(NamedTuple):
    """What is known of one network, standardised by the training set.

    Attributes:
        factors: activations and tangents ``[S, d]`` of the gradients of its output.
        gradients: for each leaf the same gradients as they are, ``[S, *shape]``.
        mean_gradients: their mean over the set, standardised by itself, ``[1, *shape]``.
        squares: ``weights -> [P]``: the sum of the squared gradients with weights ``[S]``, in units of the target.
    """

    factors: gmn_lopt.Factors
    gradients: list[Float[Array, "S ..."]]
    mean_gradients: list[Float[Array, "1 ..."]]
    squares: Callable[[Float[Array, "S"]], Float[Array, "P"]]


def standard(inputs: Inputs) -> Float[Array, "P"]:
    """The standard estimator: the mean of the squared gradients."""
    size = len(inputs.factors.tangents[0])
    return inputs.squares(jnp.full(size, 1.0 / size))


def flat(leaves: Any) -> Float[Array, "P"]:
    """Features of all leaves' entries, one for each, as one vector."""
    return jnp.concatenate([x.ravel() for x in leaves])


def sites_of(structure: gmn_lopt.GradientStructure, factors: gmn_lopt.Factors) -> list[Float[Array, "S d 2"]]:
    """The features of each site's neurons, activation and tangent; one that lacks one has the other twice."""
    found = []
    for site in structure.sites:
        a = None if site.activation is None else factors.activations[site.activation]
        g = None if site.tangent is None else factors.tangents[site.tangent]
        found.append(jnp.stack([x for x in (g if a is None else a, a if g is None else g) if x is not None], -1))
    return found


class GradMetaNet(nn.Module):
    """GradMetaNet or GradMetaNet++, by its architecture; with ``residual`` it corrects the standard estimator."""

    structure: gmn_lopt.GradientStructure
    config: Any
    residual: bool = False

    @nn.compact
    def __call__(self, inputs: Inputs) -> Float[Array, "P"]:  # noqa: D102
        module = gmn_lopt.FisherPredictor(self.config).module(self.structure).clone(name="network", parent=self)
        found = flat(module(jax.tree.map(lambda x: x[None], inputs.factors)))
        return found + standard(inputs) if self.residual else found


class Reweighted(nn.Module):
    """Beyond the paper: attention over the set chooses the weights of the squared gradients, which sum to one.

    An element is described by the mean over each site of its neurons' features after one layer, so that no permutation
    of neurons matters. At the start all weights are equal, as the standard estimator's.
    """

    structure: gmn_lopt.GradientStructure
    width: int
    blocks: int

    @nn.compact
    def __call__(self, inputs: Inputs) -> Float[Array, "P"]:  # noqa: D102
        sites = sites_of(self.structure, inputs.factors)
        x = jnp.zeros((len(sites[0]), self.width))
        for i, site in enumerate(sites):
            h = jax.nn.relu(nn.Dense(self.width, name=f"site_{i}")(site)).mean(1)
            x = x + nn.Dense(self.width, name=f"read_{i}")(h)
        for i in range(self.blocks):
            x = SelfAttention(self.width, 5, name=f"over_set_{i}")(x[None])[0]
            hidden = jax.nn.relu(nn.Dense(self.width, name=f"own_{i}")(normalize(x)))
            x = x + nn.Dense(self.width, name=f"out_{i}")(hidden)
        scores = nn.Dense(1, kernel_init=nn.initializers.zeros, name="score")(normalize(x))[:, 0]
        return inputs.squares(jax.nn.softmax(scores))


class Perceptron(nn.Module):
    """A perceptron on all factors of the set, laid end to end: no symmetry."""

    structure: gmn_lopt.GradientStructure
    width: int

    @nn.compact
    def __call__(self, inputs: Inputs) -> Float[Array, "P"]:  # noqa: D102
        x = flat(jax.tree.leaves(inputs.factors))
        for i in range(2):
            x = jax.nn.relu(nn.Dense(self.width, name=f"hidden_{i}")(x))
        return nn.Dense(sum(p.size for p in self.structure.parameters), name="out")(x)


class NeuronAsymmetric(nn.Module):
    """DeepSets over the set, an element being the features of all neurons: invariant to the set's order, no more."""

    structure: gmn_lopt.GradientStructure
    width: int

    @nn.compact
    def __call__(self, inputs: Inputs) -> Float[Array, "P"]:  # noqa: D102
        x = jnp.concatenate(jax.tree.leaves(inputs.factors), axis=1)
        for i in range(2):
            mean = nn.Dense(self.width, use_bias=False, name=f"mean_{i}")(x.mean(0))
            x = jax.nn.relu(nn.Dense(self.width, name=f"own_{i}")(x) + mean)
        return nn.Dense(sum(p.size for p in self.structure.parameters), name="out")(x.mean(0))


class BatchAsymmetric(nn.Module):
    """GradMetaNet on one "gradient", a neuron's features being those of all elements: equivariant to neurons only."""

    structure: gmn_lopt.GradientStructure
    width: int

    @nn.compact
    def __call__(self, inputs: Inputs) -> Float[Array, "P"]:  # noqa: D102
        sites = sites_of(self.structure, inputs.factors)
        places = np.cumsum([site.shape[1] for site in sites])[:-1]
        x = jnp.concatenate([jnp.moveaxis(site, 0, 1).reshape(site.shape[1], -1) for site in sites])
        encoding = jnp.concatenate([jnp.asarray(e) for e in encode_sites(self.structure)])
        y = nn.Dense(self.width, use_bias=False, name="encoding")(encoding)
        for i in range(2):
            mean = nn.Dense(self.width, use_bias=False, name=f"mean_{i}")(x.mean(0))
            x = jax.nn.relu(nn.Dense(self.width, name=f"own_{i}")(x) + mean + (y if i == 0 else 0.0))
        product = ProductLayer(self.structure, self.width, self.width, 1, name="product")
        return flat(product(jnp.split(x, places)))


class WeightSpace(nn.Module):
    """Three layers of universal neural functionals on the gradients themselves, or on their mean.

    The features of an entry are its gradients at all elements, in their order; one matrix takes them to the width.
    """

    structure: gmn_lopt.GradientStructure
    width: int
    average: bool

    @nn.compact
    def __call__(self, inputs: Inputs) -> Float[Array, "P"]:  # noqa: D102
        leaves = tuple(p.spaces for p in self.structure.parameters)
        given = inputs.mean_gradients if self.average else inputs.gradients
        cut = [p.cut_shape for p in self.structure.parameters]
        x = [jnp.moveaxis(g, 0, -1).reshape(*shape, len(g)) for g, shape in zip(given, cut)]
        features = x[0].shape[-1]
        if not self.average:
            embed = nn.Dense(self.width, name="embed")
            x, features = [jax.nn.relu(embed(y)) for y in x], self.width
        for i, (rows, columns) in enumerate([(features, self.width), (self.width, self.width), (self.width, 1)]):
            y = EquivariantLinear(leaves, rows, columns, name=f"layer_{i}")(x)
            x = [jax.nn.relu(z) if i < 2 else z for z in y if z is not None]
        return flat(x)


GMN = gmn_lopt.GradMetaNetConfig(width=34, set_layers=2, neuron_layers=1, product_width=34)
GMN_PP = gmn_lopt.GradMetaNetPlusPlusConfig(width=24, blocks=2, heads=4, product_width=24)

MODELS: dict[str, Callable[[gmn_lopt.GradientStructure], nn.Module]] = {
    "gradmetanet": lambda s: GradMetaNet(s, GMN),
    "gradmetanet++": lambda s: GradMetaNet(s, GMN_PP),
    "neuron-asymmetric": lambda s: NeuronAsymmetric(s, 10),
    "batch-asymmetric": lambda s: BatchAsymmetric(s, 24),
    "mlp": lambda s: Perceptron(s, 32),
    "weight-space, mean": lambda s: WeightSpace(s, 15, average=True),
    "weight-space, all": lambda s: WeightSpace(s, 11, average=False),
    "gradmetanet, residual": lambda s: GradMetaNet(s, GMN, residual=True),
    "gradmetanet++, residual": lambda s: GradMetaNet(s, GMN_PP, residual=True),
    "reweighted": lambda s: Reweighted(s, 30, 2),
}
"""By name: the paper's first, then ours."""
OURS = ("gradmetanet, residual", "gradmetanet++, residual", "reweighted")
SAVED = {
    "gradmetanet": gmn_lopt.FisherPredictor(GMN),
    "gradmetanet++": gmn_lopt.FisherPredictor(GMN_PP),
    "gradmetanet, residual": gmn_lopt.FisherPredictor(GMN, residual=True),
    "gradmetanet++, residual": gmn_lopt.FisherPredictor(GMN_PP, residual=True),
}
"""Those that are saved as a predictor that gmn_lopt.load_predictor reads."""


def count(weights: Any) -> int:
    """The number of weights that do something: those for copies of neurons, which these networks lack, do not."""
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    return sum(int(x.size) for path, x in leaves if "copies_mean" not in jax.tree_util.keystr(path))
