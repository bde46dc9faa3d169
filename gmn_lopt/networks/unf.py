"""Universal neural functionals (Zhou et al. 2024, arXiv:2402.05232): a linear layer over all entries of a model."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.networks.initialization import matrix, vector
from gmn_lopt.networks.pointwise import PointwiseModule
from gmn_lopt.util.checks import whole

# Dimensions of a leaf that have one index in common: one dimension, or a diagonal of several over the same space.
Block = tuple[int, ...]
Pattern = tuple[int, ...]
Stacks = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class UNF:
    """A perceptron for each parameter entry by itself, then one linear layer over all entries of the model.

    The perceptron is that of :class:`~gmn_lopt.networks.pointwise.PointwiseMLP` but for its last layer, which is
    :class:`EquivariantLinear` here: it mixes the entries of all tensors as far as the permutations of neuron spaces
    allow (arXiv:2402.05232, section 3; arXiv:2507.01649, section 6). Neurons of fixed spaces are mixed alike.

    Attributes:
        width: width of the hidden layers.
        hidden_layers: number of hidden layers, all of them per entry.
        tied: whether the weights belong to the leaves of one model. These do, in their order, and to the spaces of
            their axes, though not to the sizes of the spaces.

    Raises:
        ValueError: a size is impossible.

    Example:
        >>> import gmn_lopt
        >>> params = {"w": jnp.ones((3, 2))}
        >>> structure = gmn_lopt.analyze(lambda p, x: jnp.sum((x @ p["w"]) ** 2), params, jnp.ones((4, 3)))
        >>> module = UNF(8).module(structure, (0,), 5, extra_channels=0, time_channels=2, outputs=1)
        >>> arguments = [jnp.ones((6, 5))], [None], jnp.ones(2)
        >>> [y.shape for y in module.apply(module.init(jax.random.key(0), *arguments), *arguments)]
        [(6, 1)]
    """

    width: int = 32
    hidden_layers: int = 3
    tied: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole(self, "width")
        whole(self, "hidden_layers", most=64)

    def module(
        self,
        structure: GradientStructure,
        indices: tuple[int, ...],
        channels: int,
        extra_channels: int,
        time_channels: int,
        outputs: int,
    ) -> "UNFModule":
        """The network for some leaves of a model (see :meth:`gmn_lopt.networks.pointwise.PointwiseMLP.module`).

        Leaves that are not handled count as zero.
        """
        sizes = (channels, extra_channels, time_channels, self.width, self.hidden_layers - 1, self.width)
        mlp = PointwiseModule(*sizes)
        return UNFModule(structure, indices, mlp, outputs)


class UNFModule(nn.Module):
    """The flax module of :class:`UNF`: ``mlp`` for each entry, and ``layer`` for all of them."""

    structure: GradientStructure
    indices: tuple[int, ...]
    mlp: PointwiseModule
    outputs: int
    last_layer: ClassVar[str] = "layer"

    def setup(self) -> None:  # noqa: D102
        leaves = tuple(p.spaces for p in self.structure.parameters)
        stacks = tuple((i, space.stack) for i, space in enumerate(self.structure.spaces) if space.stack)
        self.layer = EquivariantLinear(leaves, self.mlp.outputs, self.outputs, stacks)

    def __call__(
        self, features: Sequence[Array], extra: Sequence[Array | None], time: Array
    ) -> list[Float[Array, "_ outputs"]]:
        """Compute the outputs for each parameter that is handled (as :class:`PointwiseModule` does)."""
        parameters = self.structure.parameters
        inputs: list[Array | None] = [None] * len(parameters)
        for index, x in zip(self.indices, self.mlp(features, extra, time), strict=True):
            inputs[index] = jax.nn.relu(x).reshape(*parameters[index].cut_shape, self.mlp.outputs)
        outputs = self.layer(inputs)
        return [y.reshape(-1, self.outputs) for y in (outputs[index] for index in self.indices) if y is not None]


@dataclass(frozen=True)
class View:
    """A part of a leaf that depends on some neurons only: a mean where it is read, constant otherwise where written.

    Attributes:
        leaf: the index of the leaf.
        kept: the blocks of dimensions that run over those neurons, one for each space of the pattern.
        rest: the other blocks: read, the mean over them is taken; written, the values are repeated along them.
    """

    leaf: int
    kept: tuple[Block, ...]
    rest: tuple[Block, ...]


def partitions(spaces: Sequence[int]) -> list[tuple[Block, ...]]:
    """All ways to group dimensions into blocks of one space each, where ``spaces`` says which space each runs over."""
    found: list[tuple[Block, ...]] = [()]
    for dim, space in enumerate(spaces):
        extended = []
        for blocks in found:
            extended.append((*blocks, (dim,)))
            for i, block in enumerate(blocks):
                if spaces[block[0]] == space:
                    extended.append((*blocks[:i], (*block, dim), *blocks[i + 1 :]))
        found = extended
    return found


@functools.lru_cache(maxsize=64)
def find_views(
    leaves: tuple[tuple[int, ...], ...], stacks: Stacks = ()
) -> tuple[dict[Pattern, list[View]], dict[Pattern, list[View]]]:
    """List what the layer reads and what it writes, by pattern: the spaces, in ascending order, that a view depends on.

    Every equivariant map between two leaves is a combination of reading one view and writing its values to another of
    the same pattern. Where a pattern has a space twice, the ways to match the blocks are told apart in what is read.
    ``leaves`` are as for :class:`EquivariantLinear`.
    """
    reads: dict[Pattern, list[View]] = {}
    writes: dict[Pattern, list[View]] = {}
    along = dict(stacks)
    for leaf, spaces in enumerate(leaves):
        for blocks in partitions(spaces):
            for count in range(len(blocks) + 1):
                for chosen in itertools.combinations(blocks, count):
                    rest = tuple(b for b in blocks if b not in chosen)
                    kept = sorted(chosen, key=lambda block: spaces[block[0]])
                    if not _stacks_are_kept(spaces, kept, along):
                        continue
                    pattern = tuple(spaces[block[0]] for block in kept)
                    writes.setdefault(pattern, []).append(View(leaf, tuple(kept), rest))
                    same = [list(group) for _, group in itertools.groupby(kept, key=lambda block: spaces[block[0]])]
                    for orders in itertools.product(*map(itertools.permutations, same)):
                        order = tuple(itertools.chain.from_iterable(orders))
                        if _stacks_are_kept(spaces, order, along):
                            reads.setdefault(pattern, []).append(View(leaf, order, rest))
    return reads, writes


def _stacks_are_kept(spaces: Sequence[int], kept: Sequence[Block], along: Mapping[int, tuple[int, ...]]) -> bool:
    """Whether, for each block over a stacked space, the positions in its stack are the first that are kept.

    A leaf with a stacked space has the spaces of its stack once; should one come again, the first is meant.
    """
    first = {spaces[block[0]]: block for block in reversed(kept)}
    wanted = {s for block in kept for s in along.get(spaces[block[0]], ())}
    return all(s in first and spaces.index(s) in first[s] for s in wanted)


class EquivariantLinear(nn.Module):
    """The most general affine map between collections of tensors that commutes with permutations of shared spaces.

    For each ordered pair of leaves and each partial matching of their dimensions over the same space (diagonals
    included, where a leaf has one space twice) the input leaf is averaged over what is not matched, repeated along what
    is not matched in the output leaf, and multiplied by one matrix ``[in_features, out_features]``; a bias is added for
    each leaf (one more for each of its diagonals). The number of weights does not depend on the sizes of spaces. That
    these maps span all equivariant ones is shown there (by Maron et al. 2019 for one space); where a space has fewer
    neurons than there are dimensions to match, they are not independent.

    Neurons of a stacked space, such as the hidden ones of layers that are scanned over, may be permuted at each
    position in its stack by themselves: they are matched only where these positions are.

    **Every** space counts as permutable here, also inputs and outputs, whose neurons the loss uses by position: the
    convention of Zhou et al. The most general map for those would have a matrix for each index, as many weights as
    the model has inputs. Dimensions of different fixed spaces are never matched; where positions matter, features that
    tell them apart (such as GradMetaNet's) bring them in.

    Each view of a leaf is pooled once, and all leaves that read the same pattern of spaces share one matrix product, so
    the number of products grows with the number of patterns, not of pairs of leaves.

    Attributes:
        leaves: for each leaf the spaces of its dimensions (arbitrary numbers, equal where the space is the same).
        in_features: number of features of each entry.
        out_features: number of features after the layer.
        stacks: pairs of a space and the spaces that it is stacked along, as in
            :class:`~gmn_lopt.factors.spaces.Space`; every leaf that has the space has those, too.

    Example:
        >>> layer = EquivariantLinear(((0, 1), (1,)), in_features=4, out_features=2)  # a kernel and its bias
        >>> inputs = [jnp.ones((3, 5, 4)), jnp.ones((5, 4))]
        >>> outputs = layer.apply(layer.init(jax.random.key(0), inputs), inputs)
        >>> [y.shape for y in outputs]
        [(3, 5, 2), (5, 2)]
    """

    leaves: tuple[tuple[int, ...], ...]
    in_features: int
    out_features: int
    stacks: Stacks = ()

    def setup(self) -> None:  # noqa: D102
        reads, writes = find_views(self.leaves, self.stacks)
        terms = [0] * len(self.leaves)  # number of terms that each leaf is the sum of
        rows: dict[View, int] = {}
        for pattern, views in writes.items():
            for view in views:
                rows[view] = terms[view.leaf]
                terms[view.leaf] += len(reads[pattern])
        self.rows = rows
        out = self.out_features
        self.kernels = [matrix(self, f"kernel_{i}", n * self.in_features, out) for i, n in enumerate(terms)]
        self.biases = [vector(self, f"bias_{i}", len(partitions(s)) * out) for i, s in enumerate(self.leaves)]

    def __call__(
        self, inputs: Sequence[Float[Array, "... in_features"] | None]
    ) -> list[Float[Array, "... out_features"] | None]:
        """Apply the layer.

        Args:
            inputs: for each leaf its features, ``[*shape, in_features]``; None for one that is missing, which counts as
                zero and gets no output.

        Returns:
            For each leaf ``[*shape, out_features]``.
        """
        shapes = {leaf: x.shape[:-1] for leaf, x in enumerate(inputs) if x is not None}
        sizes = {space: size for leaf in shapes for space, size in zip(self.leaves[leaf], shapes[leaf])}
        pooled: dict[tuple, jax.Array] = {}
        outputs: dict[int, jax.Array] = {}
        constants = [0] * len(inputs)  # number of biases of each leaf that have been used
        reads, writes = find_views(self.leaves, self.stacks)
        for pattern, views in writes.items():
            wanted = [view for view in views if view.leaf in shapes]
            if not wanted:
                continue
            over = tuple(sizes[space] for space in pattern)
            read = [self._read(view, inputs[view.leaf], over, pooled) for view in reads[pattern]]
            rows = len(read) * self.in_features
            kernels = [self.kernels[v.leaf][self.rows[v] * self.in_features :][:rows] for v in wanted]
            products = jnp.concatenate(read, axis=-1).reshape(-1, rows) @ jnp.concatenate(kernels, axis=1)
            for view, y in zip(wanted, jnp.split(products, len(wanted), axis=1)):
                leaf = view.leaf
                if not pattern:
                    y = y + self.biases[leaf][constants[leaf] * self.out_features :][: self.out_features]
                    constants[leaf] += 1
                y = _write(view, y.reshape(*over, self.out_features), shapes[leaf])
                outputs[leaf] = outputs[leaf] + y if leaf in outputs else y
        return [
            jnp.broadcast_to(outputs[leaf], (*shapes[leaf], self.out_features)) if leaf in shapes else None
            for leaf in range(len(inputs))
        ]

    def _read(self, view: View, x: Array | None, over: tuple[int, ...], pooled: dict[tuple, Array]) -> Array:
        if x is None:
            return jnp.zeros((*over, self.in_features), jnp.float32)
        kept = tuple(sorted(view.kept))
        values = _pool(view.leaf, x, tuple(sorted(view.kept + view.rest)), kept, pooled)
        return values.transpose(*(kept.index(block) for block in view.kept), len(kept))


def _pool(leaf: int, x: Array, blocks: tuple[Block, ...], kept: tuple[Block, ...], pooled: dict[tuple, Array]) -> Array:
    """The mean over all but the kept blocks, from the mean over one block less; ``pooled`` remembers all of them."""
    key = (leaf, blocks, kept)
    if key not in pooled:
        missing = [block for block in blocks if block not in kept]
        if missing:
            parent = tuple(block for block in blocks if block in kept or block == missing[0])
            pooled[key] = _pool(leaf, x, blocks, parent, pooled).mean(parent.index(missing[0]))
        else:
            pooled[key] = _diagonals(x, blocks)
    return pooled[key]


def _diagonals(x: jax.Array, blocks: tuple[Block, ...]) -> jax.Array:
    """Take the diagonal of each block of dimensions: one dimension for each block, then the features."""
    dims = x.ndim - 1
    if len(blocks) == dims:
        return x
    labels = [next(i for i, block in enumerate(blocks) if dim in block) for dim in range(dims)]
    return jnp.einsum(x, [*labels, dims], [*range(len(blocks)), dims])


def _write(view: View, values: Float[Array, "... out"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Lay values along the kept blocks of a leaf; off the diagonals of its blocks they are zero."""
    order = sorted(range(len(view.kept)), key=lambda i: view.kept[i])
    at = {block[0] for block in view.kept}
    values = values.transpose(*order, len(order))
    values = values.reshape(*(n if dim in at else 1 for dim, n in enumerate(shape)), values.shape[-1])
    for block in (*view.kept, *view.rest):
        for dim in block[1:]:
            ones = [n if d in (block[0], dim) else 1 for d, n in enumerate(shape)]
            values = values * jnp.eye(shape[dim], dtype=values.dtype).reshape(*ones, 1)
    return values
