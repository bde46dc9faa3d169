"""Which layers take the denoised step, and their parameters and factors as matrices.

Layers with the same numbers of inputs and outputs take it together, as one stack of matrices, so that a transformer
costs a few large operations in place of many small ones. Layers that are stacked and scanned over are such a stack to
begin with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from gmn_lopt.factors.matrices import as_stack, from_stack, is_kernel, stack_shape
from gmn_lopt.factors.structure import Factors, GradientStructure, Layer, Parameter


@dataclass(frozen=True)
class DenoisedLayer:
    """A layer that takes this step.

    Attributes:
        kernel: position of the kernel among the leaves that are handled.
        bias: position of the bias, or None.
        activation: index into ``Factors.activations``.
        tangent: index into ``Factors.tangents``.
        count: number of matrices that the kernel consists of: one, or that of the layers that are stacked.
    """

    kernel: int
    bias: int | None
    activation: int
    tangent: int
    count: int


@dataclass(frozen=True)
class LayerGroup:
    """Layers with the same numbers of inputs and outputs: ``k`` matrices ``[inputs, outputs]`` in all.

    Attributes:
        layers: the layers, in their order in the model; all of them have a bias, or none has.
        inputs: number of inputs, the bias's included.
        outputs: number of outputs.
        embedding: whether the activations are token ids.
    """

    layers: tuple[DenoisedLayer, ...]
    inputs: int
    outputs: int
    embedding: bool

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
    """The layers to which this applies: kernels that one layer uses, each one matrix, or one for each stacked layer.

    Args:
        structure: the structure of the model.
        indices: the parameters that are handled; a layer of which one is missing is left out.
    """
    kernels = [layer.kernel for layer in structure.layers]
    position = {index: i for i, index in enumerate(indices)}
    groups: dict[tuple[int, int, bool, bool, tuple[int, ...]], list[DenoisedLayer]] = {}
    for layer in structure.layers:
        if kernels.count(layer.kernel) > 1 or not _is_matrices(structure, layer):
            continue
        bias = layer.bias if _has_own_bias(structure, layer) else None
        if layer.kernel not in position or not (bias is None or bias in position):
            continue
        kernel = structure.parameters[layer.kernel]
        count, inputs, outputs = (1, *kernel.shape) if layer.embedding else stack_shape(kernel)
        places = position[layer.kernel], None if bias is None else position[bias]
        # Layers of a group that read the same activations have to cut them alike.
        cut = () if layer.embedding else tuple(kernel.sites[0].dims.index(d) for d in _site_dims(kernel, 0)[1])
        shape = inputs + (bias is not None), outputs, layer.embedding, bias is not None, cut
        groups.setdefault(shape, []).append(DenoisedLayer(*places, layer.activation, layer.tangent, count))
    return tuple(LayerGroup(tuple(layers), *shape[:3]) for shape, layers in groups.items())


def _is_matrices(structure: GradientStructure, layer: Layer) -> bool:
    kernel = structure.parameters[layer.kernel]
    if layer.embedding:  # a row for each token
        return len(kernel.shape) == 2 and len(kernel.sites) == 1 and 0 not in kernel.sites[0].dims
    if not is_kernel(kernel):
        return False
    dims = [ref.dims for ref in kernel.sites]
    once = all(len(set(d)) == len(d) for d in dims) and {*dims[0], *dims[1]} == set(range(len(kernel.cut_shape)))
    return once and structure.sites[kernel.sites[0].site].activation == layer.activation


def _has_own_bias(structure: GradientStructure, layer: Layer) -> bool:
    """Whether there is a bias for all its outputs, which no other layer uses; that of an embedding is not denoised."""
    if layer.embedding or layer.bias is None or [other.bias for other in structure.layers].count(layer.bias) > 1:
        return False
    bias, write = structure.parameters[layer.bias], structure.parameters[layer.kernel].sites[-1].site
    return [ref.site for ref in bias.sites] == [write] and bias.size == structure.sites[write].size


def as_matrices(
    group: LayerGroup, parameters: Sequence[Parameter], leaves: Sequence[Array]
) -> Float[Array, "k inputs outputs"]:
    """The kernels of a group's layers, with the biases as their last rows.

    Args:
        group: the layers.
        parameters: the parameters that are handled.
        leaves: arrays of their shapes.
    """
    rows = []
    for layer in group.layers:
        kernel, value = parameters[layer.kernel], leaves[layer.kernel]
        rows.append(value[None] if group.embedding else as_stack(kernel, value))
        if layer.bias is not None:
            bias = as_stack(parameters[layer.bias], leaves[layer.bias])
            rows[-1] = jnp.concatenate([rows[-1], _neurons_of_each(kernel, 1, bias[0])], axis=1)
    return jnp.concatenate(rows)


def from_matrices(
    group: LayerGroup, parameters: Sequence[Parameter], matrices: Float[Array, "k inputs outputs"]
) -> dict[int, Array]:
    """Undo :func:`as_matrices`: the leaves, by position."""
    leaves: dict[int, Array] = {}
    for layer, part in zip(group.layers, jnp.split(matrices, np.cumsum([x.count for x in group.layers])[:-1])):
        kernel = parameters[layer.kernel]
        rows = part if layer.bias is None else part[:, :-1]
        leaves[layer.kernel] = rows[0] if group.embedding else from_stack(kernel, rows)
        if layer.bias is not None:
            bias = _neurons_written(kernel, part[:, -1:])
            leaves[layer.bias] = from_stack(parameters[layer.bias], bias[None])
    return leaves


def activations_and_tangents(
    group: LayerGroup, parameters: Sequence[Parameter], factors: Factors
) -> tuple[tuple[Num[Array, "_ _ _"], ...], tuple[Float[Array, "_ _ _"], ...]]:
    """The distinct activations that a group reads and the tangents of its layers, each ``[matrices, S, neurons]``."""
    if group.embedding:
        ids = tuple(factors.activations[a][None] for a in group.read)
        return ids, tuple(factors.tangents[layer.tangent][None] for layer in group.layers)
    readers = {layer.activation: parameters[layer.kernel] for layer in group.layers}
    activations = tuple(_neurons_of_each(kernel, 0, factors.activations[a]) for a, kernel in readers.items())
    tangents = (_neurons_of_each(parameters[x.kernel], 1, factors.tangents[x.tangent]) for x in group.layers)
    return activations, tuple(tangents)


def _neurons_of_each(kernel: Parameter, side: int, rows: Float[Array, "S n"]) -> Float[Array, "count S m"]:
    """Cut what runs over all neurons that a kernel reads (side 0) or writes (1) into those of each of its matrices."""
    dims, shared = _site_dims(kernel, side)
    split = rows.reshape(len(rows), *(kernel.cut_shape[d] for d in dims))
    moved = jnp.moveaxis(split, [1 + dims.index(d) for d in shared], range(len(shared)))
    return moved.reshape(math.prod(kernel.cut_shape[d] for d in shared), len(rows), -1)


def _neurons_written(kernel: Parameter, parts: Float[Array, "count S m"]) -> Float[Array, "S n"]:
    """Undo :func:`_neurons_of_each` of the neurons that a kernel writes."""
    dims, shared = _site_dims(kernel, 1)
    rest = [kernel.cut_shape[d] for d in dims if d not in shared]
    split = parts.reshape(*(kernel.cut_shape[d] for d in shared), parts.shape[1], *rest)
    moved = jnp.moveaxis(split, range(len(shared)), [1 + dims.index(d) for d in shared])
    return moved.reshape(parts.shape[1], -1)


def _site_dims(kernel: Parameter, side: int) -> tuple[tuple[int, ...], list[int]]:
    """The dimensions of the cut shape that run over a site, and those of them, in order, that both sites have."""
    read, write = (ref.dims for ref in kernel.sites)
    return (read, write)[side], sorted({*read} & {*write})
