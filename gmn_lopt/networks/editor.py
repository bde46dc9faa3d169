"""Editing networks that show something by changing their weights (arXiv:2507.01649, section 7.3 and appendix F.3).

An implicit neural representation is a network from coordinates to the values of one image. An *editor* reads its
weights and changes them such that it shows the edited image:

1. *Probing* (Kofinas et al. 2024): the values of all neurons at learned points are features of the neurons.
2. *Gradients*: those of the editing loss ``(f(x_i) - I(x_i))^2`` at a few fixed points ``x_i``, whose values ``I(x_i)``
   in the edited image are known. GradMetaNet reads their set, and gives features of each weight.
3. A *weight-space network* reads the weights with these features (``Theta[9]`` for 8 of them).
4. ``theta + scale * outputs``, with a learned ``scale`` that starts at 0.01.

Several *heads* (arXiv:2602.01083) are as many changed networks, whose values are averaged.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gmn_lopt.factors.structure import Factors, GradientStructure
from gmn_lopt.factors.value_and_grad import analyze, value_grad_and_factors
from gmn_lopt.networks.deep_weight_space import DeepWeightSpace
from gmn_lopt.networks.gradmetanet import GradMetaNetConfig
from gmn_lopt.networks.gradmetanet_pp import GradMetaNetPlusPlusConfig
from gmn_lopt.networks.graph import GraphNetwork
from gmn_lopt.networks.initialization import matrix, vector
from gmn_lopt.util.checks import LARGEST, number, whole
from gmn_lopt.util.errors import first_line

FIRST_SCALE = 0.01
TOLD, TOLD_WIDTH = 8, 64  # features that carry known values to all entries, and width of the perceptron before them

Forward = Callable[[PyTree, Any], Sequence[Any]]
"""``forward(params, points)``: the values ``[points, neurons]`` of each layer, with those of the image last."""


def shown(forward: Forward, edited: PyTree, points: Float[Array, "n inputs"]) -> Float[Array, "n outputs"]:
    """What the networks of all heads show at some points: the mean of their values."""
    return jax.vmap(lambda params: forward(params, points)[-1])(edited).mean(0)


@dataclass(frozen=True)
class Editor:
    """The architecture of an editor; its steps are those of :mod:`gmn_lopt.networks.editor`.

    Attributes:
        network: the weight-space network.
        points: the points where values of the edited image are known.
        reader: what reads the set of gradients; None: gradients are not read. Its ``out_features`` are 8 in the paper.
        probes: number of learned points; 0: no probing.
        told: the control of what gradients are worth. Values of all neurons, the known values and the differences are
            handed to the network as they are: all that the gradients are made of, but for the backward pass.
        heads: number of changed networks.
        spreads: a number for each leaf that its entries are divided by where the network reads them, such as their
            standard deviation; (): none.

    Raises:
        ValueError: a size is impossible.

    Example:
        >>> def forward(p, x):
        ...     hidden = jnp.sin(x @ p["w0"] + p["b0"])
        ...     return hidden, hidden @ p["w1"] + p["b1"]
        >>> params = {"b0": jnp.ones(4), "b1": jnp.ones(3), "w0": jnp.ones((2, 4)), "w1": jnp.ones((4, 3))}
        >>> editor = Editor(GraphNetwork(8, 1), ((0.0, 0.5), (0.5, 0.0)), GradMetaNetConfig(8, out_features=8))
        >>> module = editor.module(forward, params)
        >>> weights = module.init(jax.random.key(0), params, jnp.ones((2, 3)))
        >>> edited = module.apply(weights, params, jnp.ones((2, 3)))
        >>> jax.tree.map(jnp.shape, edited)  # one head
        {'b0': (1, 4), 'b1': (1, 3), 'w0': (1, 2, 4), 'w1': (1, 4, 3)}
        >>> shown(forward, edited, jnp.ones((5, 2))).shape
        (5, 3)
    """

    network: DeepWeightSpace | GraphNetwork
    points: tuple[tuple[float, ...], ...]
    reader: GradMetaNetConfig | GradMetaNetPlusPlusConfig | None = None
    probes: int = 0
    told: bool = False
    heads: int = 1
    spreads: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        whole(self, "probes", least=0)
        whole(self, "heads", most=64)
        if not self.points or len({len(point) for point in self.points}) != 1:
            raise ValueError("Editor.points must be at least one point, and all of them of as many coordinates")
        if not all(number(x) and abs(x) <= LARGEST for point in self.points for x in point):
            raise ValueError(f"Editor.points must have coordinates of at most {LARGEST}")
        if not all(number(spread) and 0 < spread <= LARGEST for spread in self.spreads):
            raise ValueError("Editor.spreads must be positive")

    def module(self, forward: Forward, params: PyTree) -> "EditorModule":
        """The editor of networks like this one.

        Args:
            forward: how the network is computed.
            params: its parameters, or their shapes.

        Raises:
            ValueError: in one line, if ``forward`` does not take them or gives other layers than it has, or the editor
                has another number of spreads, or the network is of a kind that the weight-space network does not read.
        """
        points = jax.ShapeDtypeStruct((len(self.points), len(self.points[0])), jnp.float32)
        try:
            layers = jax.eval_shape(forward, params, points)
        except (TypeError, KeyError) as error:
            raise ValueError(f"forward does not take these parameters and points: {first_line(error)}") from error
        structure = analyze(editing_loss(forward), params, points, layers[-1])
        biases = [layer.bias for layer in structure.layers]
        sizes = [structure.parameters[i].size if i is not None else None for i in biases]
        if sizes != [layer.shape[-1] for layer in layers]:
            raise ValueError(
                "forward must give the values of every layer, and every layer must have a bias: its values have "
                f"{[layer.shape[-1] for layer in layers]} neurons, the biases that were found {sizes}"
            )
        if self.spreads and len(self.spreads) != len(structure.parameters):
            raise ValueError(f"the editor has {len(self.spreads)} spreads for {len(structure.parameters)} parameters")
        self.network.module(structure, self.heads)  # raises
        return EditorModule(structure, self, forward)


def editing_loss(forward: Forward) -> Callable[[PyTree, Array, Array], Array]:
    """``loss(params, points, values)``: the mean squared difference of what a network shows to what it is to show."""
    return lambda params, points, values: ((forward(params, points)[-1] - values) ** 2).mean()


class EditorModule(nn.Module):
    """The flax module of :class:`Editor`, for one network; ``vmap`` it for several."""

    structure: GradientStructure
    config: Editor
    forward: Forward

    def setup(self) -> None:  # noqa: D102
        c = self.config
        self.network = c.network.module(self.structure, c.heads)
        if c.reader is not None:
            self.reader = c.reader.module(self.structure)
        if c.probes:
            start = lambda key, shape: jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)  # noqa: E731
            self.probes = self.param("probes", start, (c.probes, len(c.points[0])))
        if c.told:
            self.summary = Summary()
        # Its logarithm is learned: steps of Adam are of one size, and would be a third of 0.01.
        self.log_scale = self.param("log_scale", nn.initializers.constant(math.log(FIRST_SCALE)), (), jnp.float32)

    def __call__(self, params: PyTree, values: Float[Array, "points outputs"]) -> PyTree:
        """Change the parameters.

        Args:
            params: the network's parameters.
            values: those of the edited image at the editor's points; without a reader, and not told, it is not used.

        Returns:
            The changed parameters, with one more axis in front, the heads.
        """
        c = self.config
        leaves = jax.tree.leaves(params)
        spreads = c.spreads or (1.0,) * len(leaves)
        features: list[list[Array]] = [[(leaf / spread)[..., None]] for leaf, spread in zip(leaves, spreads)]
        points = jnp.asarray(c.points, jnp.float32)
        if c.probes:
            self._add_neurons(features, self.forward(params, self.probes))
        if c.told:
            layers = self.forward(params, points)
            self._add_neurons(features, layers)
            summary = self.summary(jnp.stack([values, layers[-1] - values]))
            for own in features:
                own.append(jnp.broadcast_to(summary, (*own[0].shape[:-1], len(summary))))
        if c.reader is not None:
            _, _, factors = value_grad_and_factors(editing_loss(self.forward))(params, points, values)
            tangents = tuple(len(points) * g[None] for g in factors.tangents)  # at per-element scale
            found = self.reader(Factors(tuple(a[None] for a in factors.activations), tangents))
            for own, read in zip(features, found):
                own.extend([] if read is None else [read])
        outputs = self.network([jnp.concatenate(own, -1) for own in features])
        scale = jnp.exp(self.log_scale)
        changed = [leaf + scale * jnp.moveaxis(y, -1, 0) for leaf, y in zip(leaves, outputs)]
        return jax.tree.unflatten(jax.tree.structure(params), changed)

    def _add_neurons(self, features: list[list[Array]], layers: Sequence[Float[Array, "points _"]]) -> None:
        """Add the values of neurons at some points to the features of their biases."""
        for layer, values in zip(self.structure.layers, layers, strict=True):
            assert layer.bias is not None
            features[layer.bias].append(values.T)


class Summary(nn.Module):
    """A few features of known values, by a perceptron; every entry gets the same ones."""

    @nn.compact
    def __call__(self, known: Float[Array, "..."]) -> Float[Array, "told"]:
        """Compute the features."""
        x = known.reshape(-1)
        x = jax.nn.relu(x @ matrix(self, "kernel_0", len(x), TOLD_WIDTH) + vector(self, "bias_0", TOLD_WIDTH))
        return x @ matrix(self, "kernel_1", TOLD_WIDTH, TOLD) + vector(self, "bias_1", TOLD)
