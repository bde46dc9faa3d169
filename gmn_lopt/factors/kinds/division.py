"""How the neurons of a kernel's sites are divided among its matrices, where it has several (heads, groups)."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Num

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
