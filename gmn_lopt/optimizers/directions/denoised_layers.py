"""Which layers take the denoised step, and their parameters and factors as matrices.

Layers with the same numbers of inputs and outputs take it together, as one stack of matrices, so that a transformer
costs a few large operations in place of many small ones. Layers that are stacked and scanned over are such a stack to
begin with.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from gmn_lopt.factors.kinds import LayerKind
from gmn_lopt.factors.matrices import as_stack, from_stack
from gmn_lopt.factors.structure import Factors, GradientStructure, Layer, Parameter
from gmn_lopt.optimizers.directions.blocks import MatrixSizes, block_rows

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
        count: number of matrices that the kernel consists of: one, or that of the layers that are stacked.
        parameter: the kernel.
        direct: whether its gradient is nothing but the outer product of the factors.
    """

    kernel: int
    bias: int | None
    activation: int
    tangent: int
    count: int
    parameter: Parameter
    direct: bool


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one kind with the same numbers of inputs and outputs: ``k`` matrices ``[inputs, outputs]`` in all.

    Attributes:
        layers: the layers, in their order in the model; all of them have a bias, or none has.
        inputs: number of inputs, the bias's included.
        outputs: number of outputs.
        kind: the kind of the layers.
        rows: rows of the blocks on the diagonal that the activations' matrix is cut into; 1: a diagonal.
    """

    layers: tuple[DenoisedLayer, ...]
    inputs: int
    outputs: int
    kind: LayerKind
    rows: int

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
        return self.outputs <= self.inputs

    @property
    def biased(self) -> bool:
        """Whether the layers have biases."""
        return self.layers[0].bias is not None

    @property
    def places(self) -> set[int]:
        """The positions of their parameters among the leaves that are handled."""
        return {place for x in self.layers for place in (x.kernel, x.bias) if place is not None}

    @property
    def read(self) -> dict[int, int]:
        """The distinct activations that are read (queries and keys share theirs), each with its number of matrices."""
        return {layer.activation: layer.count for layer in self.layers}

    @property
    def reads(self) -> tuple[int, ...]:
        """For each of the ``k`` matrices the place of its activations' moment among the ``u`` distinct ones."""
        start, starts = 0, {}
        for activation, count in self.read.items():
            starts[activation] = start
            start += count
        return tuple(starts[layer.activation] + i for layer in self.layers for i in range(layer.count))


def layer_groups(structure: GradientStructure, indices: Sequence[int]) -> tuple[LayerGroup, ...]:
    """The layers to which this applies: those whose kernel is a matrix, or one for each of a stack.

    Of layers that use one kernel between different neurons (a table of embeddings that is the output layer too, the
    products of a derivative in the input) it is the first that counts, and rather one that reads neurons.

    Args:
        structure: the structure of the model.
        indices: the parameters that are handled; a layer of which one is missing is left out.
    """
    position = {index: i for i, index in enumerate(indices)}
    groups: dict[tuple[int, int, LayerKind, bool, Hashable], list[DenoisedLayer]] = {}
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
        # Layers of a group that read the same activations have to cut them alike.
        alike = matrices.inputs + (bias is not None), matrices.outputs, layer.kind, bias is not None, matrices.cut
        alone = sum(layer.kernel in other.leaves for other in structure.layers) == 1
        found = DenoisedLayer(*places, layer.activation, layer.tangent, matrices.count, kernel, layer.direct and alone)
        groups.setdefault(alike, []).append(found)
    made = [LayerGroup(tuple(layers), *alike[:3], rows=alike[0]) for alike, layers in groups.items()]
    sizes = [_sizes(group) for group in made]
    others = sum(structure.parameters[i].size for i in indices) - sum(s.parameters for s in sizes)
    rows = block_rows(sizes, others)
    return tuple(replace(group, rows=r) for group, r in zip(made, rows))


def _sizes(group: LayerGroup) -> MatrixSizes:
    kernels, activations = len(group.reads), sum(group.read.values())
    return MatrixSizes(group.inputs, group.outputs, kernels, activations, group.kind.has_diagonal_moment)


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
    bias, write = structure.parameters[layer.bias], structure.parameters[layer.kernel].sites[-1].site
    alone = [other.bias for other in structure.layers].count(layer.bias) == 1
    covers = [ref.site for ref in bias.sites] == [write] and bias.size == structure.sites[write].size
    return layer.bias if alone and covers else None


def as_matrices(
    group: LayerGroup, parameters: Sequence[Parameter], leaves: Sequence[Array]
) -> Float[Array, "k inputs outputs"]:
    """The kernels of a group's layers, with the biases as their last rows, from arrays shaped like the parameters."""
    rows = []
    for layer in group.layers:
        kernel, value = parameters[layer.kernel], leaves[layer.kernel]
        rows.append(group.kind.as_matrices(kernel, value))
        if layer.bias is not None:
            bias = as_stack(parameters[layer.bias], leaves[layer.bias])
            rows[-1] = jnp.concatenate([rows[-1], group.kind.tangent_rows(kernel, bias[0])], axis=1)
    return jnp.concatenate(rows)


def from_matrices(
    group: LayerGroup, parameters: Sequence[Parameter], matrices: Float[Array, "k inputs outputs"]
) -> dict[int, Array]:
    """Undo :func:`as_matrices`: the leaves, by position."""
    leaves: dict[int, Array] = {}
    for layer, part in zip(group.layers, jnp.split(matrices, np.cumsum([x.count for x in group.layers])[:-1])):
        kernel = parameters[layer.kernel]
        rows = part if layer.bias is None else part[:, :-1]
        leaves[layer.kernel] = group.kind.from_matrices(kernel, rows)
        if layer.bias is not None:
            bias = group.kind.from_tangent_rows(kernel, part[:, -1:])
            leaves[layer.bias] = from_stack(parameters[layer.bias], bias[None])
    return leaves


def read_sets(group: LayerGroup, factors: Factors) -> Sets:
    """The distinct activations that a group reads, and the tangents of its layers, as they are."""
    return tuple(factors.activations[a] for a in group.read), tuple(factors.tangents[x.tangent] for x in group.layers)


def activations_and_noise(
    group: LayerGroup, sets: Sets, damping: float
) -> tuple[tuple[Num[Array, "_ _ _"], ...], tuple[Float[Array, "_ _ _"], ...]]:
    """What the matrices of a group read, and what stands for their noise, each ``[matrices, rows, neurons]``."""
    read = dict(zip(group.read, sets[0], strict=True))
    readers = {layer.activation: layer.parameter for layer in group.layers}
    activations = (group.kind.activation_rows(kernel, read[a]) for a, kernel in readers.items())
    noise = (
        group.kind.noise_rows(layer.parameter, read[layer.activation], tangent, group.biased, damping)
        for layer, tangent in zip(group.layers, sets[1], strict=True)
    )
    return tuple(activations), tuple(noise)
