"""Which layers take the denoised step, and their parameters and factors as matrices.

Layers with the same numbers of inputs and outputs take it together, as one stack of matrices, so that a transformer
costs a few large operations in place of many small ones. Layers that are stacked and scanned over are such a stack to
begin with. Small layers of about one size are padded to the largest of them: what they cost is the number of
operations, to run and to compile.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from gmn_lopt.factors.kinds import LayerKind
from gmn_lopt.factors.kinds.base import Matrices
from gmn_lopt.factors.matrices import as_stack, from_stack
from gmn_lopt.factors.structure import Factors, GradientStructure, Layer, Parameter
from gmn_lopt.optimizers.directions.blocks import MatrixSizes, block_rows
from gmn_lopt.util.stacks import one_stack

# Layers of sides up to JOINED may be padded, to at most ALIKE times their larger side, or to SMALLEST.
JOINED, ALIKE, SMALLEST = 128, 2, 64

# Activations and tangents.
Sets = tuple[tuple[Num[Array, "_ _"], ...], tuple[Float[Array, "_ _"], ...]]


@dataclass(frozen=True)
class DenoisedLayer:
    """A layer that takes this step.

    Attributes:
        kernel: position of the kernel among the leaves that are handled.
        bias: position of the bias, or None.
        activation: index into ``Factors.activations``.
        tangent: index into ``Factors.tangents``.
        parameter: the kernel.
        kind: the kind of the layer.
        matrices: what its kernel is as matrices, without the bias.
        direct: whether its gradient is nothing but the outer product of the factors.
        unbiased: the parts ``(start, stop)`` of the set, as shares of it, to which the bias is not added.
        residual: whether its outputs are added to a residual stream.
        start: of the matrices that the kernel consists of, the first that is meant; usually all are.
    """

    kernel: int
    bias: int | None
    activation: int
    tangent: int
    parameter: Parameter
    kind: LayerKind
    matrices: Matrices
    direct: bool
    unbiased: tuple[tuple[float, float], ...] = ()
    residual: bool = False
    start: int = 0

    @property
    def count(self) -> int:
        """Number of matrices that the kernel consists of: one, or that of the layers that are stacked."""
        return self.matrices.count

    @property
    def inputs(self) -> int:
        """Number of inputs of each, the bias's included."""
        return self.matrices.inputs + (self.bias is not None)

    @property
    def outputs(self) -> int:
        """Number of outputs of each."""
        return self.matrices.outputs

    @property
    def tall(self) -> bool:
        """Whether the smaller side is that of the outputs."""
        return self.outputs <= self.inputs

    @property
    def reads(self) -> Hashable:
        """Equal for layers whose matrices of the activations are the same."""
        return self.activation, self.kind, self.matrices.cut, self.bias is None, self.unbiased

    def bias_inputs(self, elements: int) -> np.ndarray:
        """What the bias reads at each element of a set: one, or zero where it is not added."""
        inputs = np.full(elements, self.bias is not None)
        for start, stop in self.unbiased:
            inputs[round(start * elements) : round(stop * elements)] = False
        return inputs


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are treated as one stack: ``k`` matrices ``[inputs, outputs]`` in all, small ones padded with zeros.

    Attributes:
        layers: the layers, in their order in the model; all read neurons, are tall, are residual, or none is.
        rows: rows of the blocks on the diagonal that the activations' matrix is cut into; 1: a diagonal.
    """

    layers: tuple[DenoisedLayer, ...]
    rows: int

    @property
    def inputs(self) -> int:
        """The largest number of inputs, the bias's included."""
        return max(layer.inputs for layer in self.layers)

    @property
    def outputs(self) -> int:
        """The largest number of outputs."""
        return max(layer.outputs for layer in self.layers)

    @property
    def reads_neurons(self) -> bool:
        """Whether activations are neurons."""
        return self.layers[0].kind.reads_neurons

    @property
    def blocks(self) -> int:
        """Number of blocks; the last may be padded with zeros."""
        return -(-self.inputs // self.rows)

    @property
    def diagonal(self) -> bool:
        """Whether only the diagonal of the activations' matrix is kept."""
        return self.rows == 1

    @property
    def tall(self) -> bool:
        """Whether the smaller side is that of the outputs."""
        return self.layers[0].tall

    @property
    def residual(self) -> bool:
        """Whether their outputs are added to residual streams."""
        return self.layers[0].residual

    @property
    def places(self) -> set[int]:
        """The positions of their parameters among the leaves that are handled."""
        return {place for x in self.layers for place in (x.kernel, x.bias) if place is not None}

    @property
    def readers(self) -> list[DenoisedLayer]:
        """A layer for each of the distinct activations that are read; queries and keys share theirs."""
        found: dict[Hashable, DenoisedLayer] = {}
        for layer in self.layers:
            found.setdefault(layer.reads, layer)
        return list(found.values())

    @property
    def reads(self) -> tuple[int, ...]:
        """For each of the ``k`` matrices the place of its activations' moment among the ``u`` distinct ones."""
        start, starts = 0, {}
        for layer in self.readers:
            starts[layer.reads] = start
            start += layer.count
        return tuple(starts[layer.reads] + i for layer in self.layers for i in range(layer.count))


def layer_groups(structure: GradientStructure, indices: Sequence[int]) -> tuple[LayerGroup, ...]:
    """The layers to which this applies: those whose kernel is a matrix, or one for each of a stack.

    Of layers that use one kernel between different neurons (a table of embeddings that is the output layer too, the
    products of a derivative in the input) it is the first that counts, and rather one that reads neurons.

    Args:
        structure: the structure of the model.
        indices: the parameters that are handled; a layer of which one is missing is left out.
    """
    position = {index: i for i, index in enumerate(indices)}
    residual = residual_kernels(structure)
    found: list[DenoisedLayer] = []
    first: dict[int, Layer] = {}
    for layer in sorted(structure.layers, key=lambda layer: not layer.kind.reads_neurons):
        if layer.kernel is not None:
            first.setdefault(layer.kernel, layer)
    for layer in structure.layers:
        if layer.kernel is None or first[layer.kernel] is not layer:
            continue
        kernel = structure.parameters[layer.kernel]
        matrices = layer.kind.matrices(kernel)
        bias = _own_bias(structure, layer)
        if matrices is None:
            continue
        if layer.kernel not in position or not (bias is None or bias in position):
            continue
        places = position[layer.kernel], None if bias is None else position[bias]
        alone = sum(layer.kernel in other.leaves for other in structure.layers) == 1
        factors = layer.activation, layer.tangent
        size = structure.tangent_shapes[layer.tangent][0]
        unbiased = () if bias is None else tuple((start / size, stop / size) for start, stop in layer.unbiased)
        direct = layer.direct and alone
        streams = layer.kernel in residual
        found.append(DenoisedLayer(*places, *factors, kernel, layer.kind, matrices, direct, unbiased, streams))
    groups = [LayerGroup(tuple(layers), 0) for layers in _together(found)]
    sizes = [_sizes(group) for group in groups]
    others = sum(structure.parameters[i].size for i in indices) - sum(s.parameters for s in sizes)
    rows = block_rows(sizes, others)
    return tuple(replace(group, rows=r) for group, r in zip(groups, rows))


def residual_kernels(structure: GradientStructure) -> frozenset[int]:
    """The kernels whose outputs are added to a residual stream.

    That is a space of neurons that several kernels write and that is read at several sites, but which no kernel takes
    to itself, as that of a recurrent cell does.

    Example:
        >>> def loss(w, x):
        ...     x = x @ w[0]
        ...     return jnp.sum((x + jnp.tanh(x @ w[1]) @ w[2]) @ w[3])
        >>> w = [jnp.ones(shape) for shape in ((2, 3), (3, 4), (4, 3), (3, 1))]
        >>> sorted(residual_kernels(gmn_lopt.analyze(loss, w, jnp.ones((8, 2)))))
        [0, 2]
    """
    writers: dict[int, set[int]] = {}
    reads: dict[int, set[int]] = {}
    recurrent: set[int] = set()
    for layer in structure.layers:
        if layer.kernel is None:
            continue
        sites = [structure.sites[ref.site] for ref in structure.parameters[layer.kernel].sites]
        # Of stacked layers the streams between them are copies of the same neurons.
        spaces = [[s for i, s in enumerate(site.spaces) if i not in site.copies] for site in sites]
        if len(sites) > 1:
            for space in spaces[0]:
                reads.setdefault(space, set()).add(layer.activation)
            recurrent |= {*spaces[0]} & {*spaces[-1]}
        if len(spaces[-1]) == 1 and sites[-1].tangent is not None:
            writers.setdefault(spaces[-1][0], set()).add(layer.kernel)
    streams = {space for space, kernels in writers.items() if len(kernels) > 1 and len(reads.get(space, ())) > 1}
    return frozenset(kernel for space in streams - recurrent for kernel in writers[space])


def _together(layers: Sequence[DenoisedLayer]) -> list[list[DenoisedLayer]]:
    """Layers that are one stack: of the same size, or small and of about one size; all in the order of the model."""
    alike: dict[tuple[tuple[bool, ...], tuple[int, int] | None], list[DenoisedLayer]] = {}
    for layer in layers:
        size = None if _joins(layer) else (layer.inputs, layer.outputs)
        known = layer.kind.reads_neurons, layer.kind.has_diagonal_moment, layer.tall, layer.residual
        alike.setdefault((known, size), []).append(layer)
    groups: list[list[DenoisedLayer]] = []
    for (_, size), members in alike.items():
        if size is not None:
            groups.append(members)
            continue
        parts: list[list[DenoisedLayer]] = []
        for layer in sorted(members, key=_side, reverse=True):
            if not parts or _side(parts[-1][0]) > max(ALIKE * _side(layer), SMALLEST):
                parts.append([])
            parts[-1].append(layer)
        groups += parts
    order = {id(layer): i for i, layer in enumerate(layers)}
    groups = [sorted(group, key=lambda layer: order[id(layer)]) for group in groups]
    return sorted(groups, key=lambda group: order[id(group[0])])


def _side(layer: DenoisedLayer) -> int:
    return max(layer.inputs, layer.outputs)


def _joins(layer: DenoisedLayer) -> bool:
    return layer.kind.reads_neurons and not layer.kind.has_diagonal_moment and _side(layer) <= JOINED


def _sizes(group: LayerGroup) -> MatrixSizes:
    parameters = sum(layer.count * layer.inputs * layer.outputs for layer in group.layers)
    kernels, activations = len(group.reads), sum(layer.count for layer in group.readers)
    diagonal = group.layers[0].kind.has_diagonal_moment
    return MatrixSizes(parameters, group.inputs, group.outputs, kernels, activations, diagonal)


def why_not_denoised(structure: GradientStructure, index: int) -> str:
    """Why a parameter is in none of the groups."""
    parameter = structure.parameters[index]
    layers = [layer for layer in structure.layers if layer.kernel == index]
    if layers:
        return "not a matrix from neurons to neurons"
    if any(layer.bias == index for layer in structure.layers):
        return "a bias that is no row of a kernel"
    if any(index in layer.leaves for layer in structure.layers):
        return "a kernel is computed from it, but it is not that kernel, entry by entry"
    return parameter.reason


def _own_bias(structure: GradientStructure, layer: Layer) -> int | None:
    """The bias, if it is for all outputs, no other layer uses it, and it may be a row of the kernel."""
    if not layer.kind.reads_neurons or layer.bias is None or layer.kernel is None:
        return None
    if layer.unbiased and not (layer.kind.rows_are_elements and structure.parameters[layer.bias].reason == ""):
        return None
    bias, write = structure.parameters[layer.bias], structure.parameters[layer.kernel].sites[-1].site
    alone = [other.bias for other in structure.layers].count(layer.bias) == 1
    covers = [ref.site for ref in bias.sites] == [write] and bias.size == structure.sites[write].size
    return layer.bias if alone and covers else None


def as_matrices(
    group: LayerGroup, parameters: Sequence[Parameter], leaves: Sequence[Array]
) -> Float[Array, "k inputs outputs"]:
    """The kernels of a group's layers, with the biases as their last rows, from arrays shaped like the parameters."""
    stacks = []
    for layer in group.layers:
        kernel, value = parameters[layer.kernel], leaves[layer.kernel]
        stacks.append(layer.kind.as_matrices(kernel, value))
        if layer.bias is not None:
            bias = as_stack(parameters[layer.bias], leaves[layer.bias])
            stacks[-1] = jnp.concatenate([stacks[-1], layer.kind.tangent_rows(kernel, bias[0])], axis=1)
    return one_stack(stacks, group.inputs, group.outputs)


def from_matrices(
    group: LayerGroup, parameters: Sequence[Parameter], matrices: Float[Array, "k inputs outputs"]
) -> dict[int, Array]:
    """Undo :func:`as_matrices`: the leaves, by position."""
    leaves: dict[int, Array] = {}
    for layer, part in zip(group.layers, jnp.split(matrices, np.cumsum([x.count for x in group.layers])[:-1])):
        kernel, inputs = parameters[layer.kernel], layer.matrices.inputs
        leaves[layer.kernel] = layer.kind.from_matrices(kernel, part[:, :inputs, : layer.outputs])
        if layer.bias is not None:
            row = part[:, inputs : inputs + 1, : layer.outputs]
            bias = layer.kind.from_tangent_rows(kernel, row)
            leaves[layer.bias] = from_stack(parameters[layer.bias], bias[None])
    return leaves


def read_sets(group: LayerGroup, factors: Factors) -> Sets:
    """The distinct activations that a group reads, and the tangents of its layers, as they are."""
    activations = tuple(factors.activations[layer.activation] for layer in group.readers)
    return activations, tuple(factors.tangents[layer.tangent] for layer in group.layers)


def activations_and_noise(
    group: LayerGroup, sets: Sets, damping: float
) -> tuple[list[Num[Array, "_ _ _"]], list[Float[Array, "_ _ _"]]]:
    """What the matrices of a group read, and what stands for their noise, each ``[matrices, rows, neurons]``.

    Where a bias is added to some elements only, what it reads is one more of the neurons.
    """
    read = {layer.reads: activation for layer, activation in zip(group.readers, sets[0], strict=True)}
    activations = [
        _with_bias(layer, _own(layer, layer.kind.activation_rows(layer.parameter, read[layer.reads])))
        for layer in group.readers
    ]
    noise = [
        _own(layer, layer.kind.noise_rows(layer.parameter, read[layer.reads], tangent, layer.bias is not None, damping))
        for layer, tangent in zip(group.layers, sets[1], strict=True)
    ]
    return activations, noise


def _own(layer: DenoisedLayer, stack: Num[Array, "all _ _"]) -> Num[Array, "count _ _"]:
    """Of all matrices that a kernel consists of those that are meant."""
    return stack[layer.start : layer.start + layer.count]


def _with_bias(layer: DenoisedLayer, stack: Num[Array, "count S n"]) -> Num[Array, "count S _"]:
    """What a layer reads, and, where that differs between elements, what its bias reads."""
    if not layer.unbiased:
        return stack
    read = jnp.asarray(layer.bias_inputs(stack.shape[1]), stack.dtype)
    return jnp.concatenate([stack, jnp.broadcast_to(read[:, None], (*stack.shape[:2], 1))], axis=2)
