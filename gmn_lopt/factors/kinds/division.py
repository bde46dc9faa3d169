"""How the neurons of a kernel's sites are divided among its matrices, where it has several (heads, groups)."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from gmn_lopt.factors.kinds.base import LayerKind
from gmn_lopt.factors.matrices import as_stack, from_stack
from gmn_lopt.factors.spaces import Parameter


def shared_dims(kernel: Parameter) -> list[int]:
    """The dimensions of a kernel's cut shape that both of its sites run over."""
    read, write = (ref.dims for ref in kernel.sites)
    return sorted({*read} & {*write})


def divide_neurons(kernel: Parameter, side: int, rows: Num[Array, "S n"]) -> Num[Array, "count S m"]:
    """Cut what runs over all neurons that a kernel reads (side 0) or writes (1) into those of each of its matrices."""
    dims, shared = kernel.sites[side].dims, shared_dims(kernel)
    split = rows.reshape(len(rows), *(kernel.cut_shape[d] for d in dims))
    moved = jnp.moveaxis(split, [1 + dims.index(d) for d in shared], range(len(shared)))
    return moved.reshape(math.prod(kernel.cut_shape[d] for d in shared), len(rows), -1)


def join_neurons(kernel: Parameter, rows: Num[Array, "count S m"]) -> Num[Array, "S n"]:
    """Undo :func:`divide_neurons` of what is written."""
    dims, shared = kernel.sites[1].dims, shared_dims(kernel)
    rest = [kernel.cut_shape[d] for d in dims if d not in shared]
    split = rows.reshape(*(kernel.cut_shape[d] for d in shared), rows.shape[1], *rest)
    moved = jnp.moveaxis(split, range(len(shared)), [1 + dims.index(d) for d in shared])
    return moved.reshape(rows.shape[1], -1)


class DividedKind(LayerKind):
    """A kind whose kernels are stacks of matrices between the neurons of their two sites."""

    def as_matrices(self, kernel: Parameter, value: Float[Array, "..."]) -> Float[Array, "count inputs outputs"]:
        """As :func:`gmn_lopt.factors.matrices.as_stack`."""
        return as_stack(kernel, value)

    def from_matrices(self, kernel: Parameter, matrices: Float[Array, "count inputs outputs"]) -> Float[Array, "..."]:
        """Undo :meth:`as_matrices`."""
        return from_stack(kernel, matrices)

    def tangent_rows(self, kernel: Parameter, tangent: Float[Array, "S d_out"]) -> Float[Array, "count S outputs"]:
        """The neurons written, divided among the matrices."""
        return divide_neurons(kernel, 1, tangent)

    def from_tangent_rows(self, kernel: Parameter, rows: Float[Array, "count S outputs"]) -> Float[Array, "S d_out"]:
        """Undo :meth:`tangent_rows`."""
        return join_neurons(kernel, rows)
