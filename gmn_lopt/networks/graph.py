"""Graph networks on the neurons and weights of a model (Lim et al. 2023, arXiv:2312.04501; Kofinas et al. 2024).

A neuron is a node, a weight is an edge between two of them, a bias is a feature of its neuron. Neurons of one space are
handled alike, whatever their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gmn_lopt.factors.structure import GradientStructure, Parameter
from gmn_lopt.networks.gradmetanet_pp import normalize
from gmn_lopt.networks.initialization import matrix, vector
from gmn_lopt.networks.weight_space import Embedding, Readout
from gmn_lopt.util.checks import whole


@dataclass(frozen=True)
class GraphNetwork:
    """A network on the parameters of a model that sends messages along its weights, both ways.

    One layer, with ``e`` for an edge between neurons ``i`` and ``j``, ``n`` for nodes and ``^`` for
    :func:`~gmn_lopt.networks.gradmetanet_pp.normalize`:

    - *messages* ``m = relu(e^ A + n_i^ B + n_j^ C + c)``, and ``e <- e + m D``;
    - *nodes* ``n <- n + relu([n^, mean of m where it is i, mean of m where it is j] M1 + (mean of all n^) M2 + c) M3``.

    Kernels over two spaces are edges; leaves over one space, such as biases, are features of its nodes; leaves over
    none, as the bias of a single output, are features of one more node that has no edges. All edges share their
    matrices, and so do all nodes: what tells layers apart is the embedding of each leaf and of each space.

    Attributes:
        width: number of features of each edge and node.
        layers: number of layers.

    Raises:
        ValueError: a size is impossible.

    Example:
        >>> loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]) ** 2)
        >>> params = {"b": jnp.ones(3), "v": jnp.ones((3, 4)), "w": jnp.ones((2, 3))}
        >>> module = GraphNetwork(8, 2).module(gmn_lopt.analyze(loss, params, jnp.ones((5, 2))), outputs=1)
        >>> features = [params[name][..., None] for name in "bvw"]
        >>> outputs = module.apply(module.init(jax.random.key(0), features), features)
        >>> [y.shape for y in outputs]
        [(3, 1), (3, 4, 1), (2, 3, 1)]
    """

    width: int = 32
    layers: int = 4

    def __post_init__(self) -> None:
        whole(self, "width")
        whole(self, "layers", most=64)

    def module(self, structure: GradientStructure, outputs: int) -> "GraphNetworkModule":
        """The network for a model, with so many outputs for each parameter entry.

        Raises:
            ValueError: a leaf is over more than two spaces, or over one twice: that is no edge.
        """
        for leaf in structure.parameters:
            if len(leaf.spaces) > 2 or len(set(leaf.spaces)) < len(leaf.spaces):
                raise ValueError(
                    f"GraphNetwork: {leaf.name} is over the spaces {leaf.spaces}, an edge has two different ones; "
                    "take DeepWeightSpace"
                )
        return GraphNetworkModule(structure, self, outputs)


class GraphNetworkModule(nn.Module):
    """The flax module of :class:`GraphNetwork`."""

    structure: GradientStructure
    config: GraphNetwork
    outputs: int

    @nn.compact
    def __call__(self, features: Sequence[Float[Array, "..."]]) -> tuple[Float[Array, "..."], ...]:
        """From features ``[*shape, channels]`` of each leaf to outputs ``[*shape, outputs]``.

        The number of channels may differ from leaf to leaf.
        """
        width, leaves, spaces = self.config.width, self.structure.parameters, self.structure.spaces
        embedded = Embedding(self.structure, width, name="embedding")(features)
        edges = jnp.concatenate([x.reshape(-1, width) for leaf, x in zip(leaves, embedded) if len(leaf.spaces) == 2])
        sizes = [*(space.size for space in spaces), 1]
        kinds = self.param("spaces", nn.initializers.normal(0.5), (len(sizes), width), jnp.float32)
        nodes = [jnp.broadcast_to(kind, (size, width)) for kind, size in zip(kinds, sizes)]
        for leaf, x in zip(leaves, embedded):
            if len(leaf.spaces) < 2:
                place = self._place(leaf)
                nodes[place] = nodes[place] + x
        n = jnp.concatenate(nodes)
        for i in range(self.config.layers):
            edges, n = GraphLayer(self.structure, width, name=f"layers_{i}")(edges, n)
        e = iter(_cut(jax.nn.relu(normalize(edges)), [leaf.size for leaf in leaves if len(leaf.spaces) == 2]))
        nodes = _cut(jax.nn.relu(normalize(n)), sizes)
        final = [
            next(e).reshape(*leaf.cut_shape, width)
            if len(leaf.spaces) == 2
            else nodes[self._place(leaf)].reshape(*leaf.cut_shape, width)
            for leaf in leaves
        ]
        return Readout(self.structure, self.outputs, name="readout")(final)

    def _place(self, leaf: Parameter) -> int:
        """Which nodes a leaf that is no edge belongs to: those of its space, or the last one."""
        return leaf.spaces[0] if leaf.spaces else len(self.structure.spaces)


class GraphLayer(nn.Module):
    """One layer of :class:`GraphNetwork`; all edges are one array, and so are all nodes."""

    structure: GradientStructure
    width: int

    @nn.compact
    def __call__(
        self, edges: Float[Array, "edges f"], nodes: Float[Array, "nodes f"]
    ) -> tuple[Float[Array, "edges f"], Float[Array, "nodes f"]]:
        """Compute the next features of edges and nodes."""
        square = self.width, self.width
        sizes = [*(space.size for space in self.structure.spaces), 1]
        kernels = [leaf for leaf in self.structure.parameters if len(leaf.spaces) == 2]
        own = normalize(nodes)
        first = _cut(own @ matrix(self, "first", *square), sizes)
        second = _cut(own @ matrix(self, "second", *square) + vector(self, "edge_bias", self.width), sizes)
        ends = [(first[leaf.spaces[0]][:, None] + second[leaf.spaces[1]]).reshape(-1, self.width) for leaf in kernels]
        m = jax.nn.relu(normalize(edges) @ matrix(self, "edge", *square) + jnp.concatenate(ends))
        as_first, as_second = ([jnp.zeros((size, self.width), m.dtype) for size in sizes] for _ in range(2))
        for leaf, values in zip(kernels, _cut(m, [leaf.size for leaf in kernels])):
            values = values.reshape(*leaf.cut_shape, self.width)
            i, j = leaf.spaces
            as_first[i] = as_first[i] + values.mean(1)
            as_second[j] = as_second[j] + values.mean(0)
        read = jnp.concatenate([own, jnp.concatenate(as_first), jnp.concatenate(as_second)], -1)
        h = read @ matrix(self, "node", 3 * self.width, self.width)
        h = jax.nn.relu(h + (own.mean(0) @ matrix(self, "all", *square) + vector(self, "node_bias", self.width)))
        return edges + m @ matrix(self, "edge_out", *square), nodes + h @ matrix(self, "node_out", *square)


def _cut(x: Float[Array, "n f"], sizes: Sequence[int]) -> list[Float[Array, "_ f"]]:
    return jnp.split(x, np.cumsum(sizes)[:-1])
