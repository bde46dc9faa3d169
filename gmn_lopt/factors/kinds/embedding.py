"""Embeddings: lookups of rows of a kernel (``gather``).

A lookup is the product with one-hot rows, which are never built: its activations are token ids ``[S, 1]``, which are at
no site, and their second moment is a diagonal, how often each token occurs.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from gmn_lopt.factors.kinds.base import KernelDims, LayerKind, Matrices
from gmn_lopt.factors.program import Equation
from gmn_lopt.factors.spaces import Parameter


@dataclass(frozen=True)
class Embedding(LayerKind):
    """A lookup of one row for each index."""

    reads_neurons = False
    has_diagonal_moment = True

    @classmethod
    def match(cls, equation: Equation, kernels: Sequence[int]) -> tuple[LayerKind, int] | None:
        """A gather that takes one position along one dimension, and all others whole."""
        if equation.name != "gather" or 0 not in kernels:
            return None
        if equation.params["dimension_numbers"].operand_batching_dims or len(indexed := _indexed(equation)) != 1:
            return None
        return None if equation.params["slice_sizes"][indexed[0]] != 1 else (cls(), 0)

    def kernel_dims(self, equation: Equation, operand: int) -> KernelDims:
        """The tokens are the inputs."""
        indexed = _indexed(equation)
        return KernelDims(indexed, tuple(d for d in range(len(equation.inputs[0].shape)) if d not in indexed))

    def neuron_dims(self, equation: Equation, operand: int, shared: Collection[int]) -> tuple[set[int], set[int]]:
        """The dimension of the index vectors, and those of the slices."""
        return {len(equation.inputs[1].shape) - 1}, set(equation.params["dimension_numbers"].offset_dims)

    def product(self, equation: Equation, operand: int, kernel: Array, recorded: Array) -> Array:
        """The rows of a kernel."""
        ids = jnp.zeros(equation.inputs[1].shape, recorded.dtype)
        return equation.bind(kernel, ids.at[..., _id_column(equation)].set(recorded[..., 0]))

    def record(self, equation: Equation, activation: Shaped[Array, "... n"]) -> Shaped[Array, "... 1"]:
        """The token ids; other components of the index vectors start whole slices."""
        return activation[..., _id_column(equation), None]

    def recorded_dims(self, rank: int) -> tuple[int, ...]:
        """All but that of the index vectors."""
        return tuple(range(rank - 1))

    def matrices(self, kernel: Parameter) -> Matrices | None:
        """One, with a row for each token."""
        if len(kernel.shape) != 2 or len(kernel.sites) != 1 or 0 in kernel.sites[0].dims:
            return None
        return Matrices(1, *kernel.shape)

    def second_moment(self, rows: Int[Array, "1 S 1"], inputs: int) -> Float[Array, "1 n"]:
        """The share of each token."""
        return jnp.zeros((1, inputs), jnp.float32).at[0, rows[0, :, 0]].add(1.0 / rows.shape[1])


def _indexed(equation: Equation) -> tuple[int, ...]:
    """The dimensions of a gather's operand that are not taken whole."""
    collapsed = equation.params["dimension_numbers"].collapsed_slice_dims
    sizes = zip(equation.inputs[0].shape, equation.params["slice_sizes"])
    return tuple(d for d, (size, length) in enumerate(sizes) if d in collapsed or size != length)


def _id_column(equation: Equation) -> int:
    """Which component of a lookup's index vectors is the row to take."""
    (indexed,) = _indexed(equation)
    return equation.params["dimension_numbers"].start_index_map.index(indexed)
