"""Kernels as stacks of matrices, from the neurons that they read to those that they write; their orthogonalisation.

A matrix is what lies between the neurons of a kernel's first site and those of its second; the positions of a window go
with the first. Axes that belong to neither site, or to both (heads, groups, stacked layers), make the stack.
"""

import math

import jax.numpy as jnp
import optax.contrib
from jaxtyping import Array, Float

from gmn_lopt.factors.spaces import Parameter


def is_kernel(parameter: Parameter) -> bool:
    """Whether a parameter maps the neurons of one site to those of another, so that it is a matrix (or a stack)."""
    return len(parameter.sites) == 2 and min(stack_layout(parameter)[1][1:]) > 1


def as_stack(parameter: Parameter, value: Float[Array, "..."]) -> Float[Array, "batch d_in d_out"]:
    """Lay a parameter out as a stack of matrices, neurons read times neurons written; a bias as rows."""
    order, sizes = stack_layout(parameter)
    return value.reshape(parameter.cut_shape).transpose(order).reshape(sizes)


def from_stack(parameter: Parameter, stack: Float[Array, "batch d_in d_out"]) -> Float[Array, "..."]:
    """Undo :func:`as_stack`."""
    order, _ = stack_layout(parameter)
    inverse = [order.index(d) for d in range(len(order))]
    return stack.reshape([parameter.cut_shape[d] for d in order]).transpose(inverse).reshape(parameter.shape)


def stack_layout(parameter: Parameter) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """The order of the dimensions of the cut shape in :func:`as_stack`, and the shape of the stack."""
    *reads, write = (ref.dims for ref in parameter.sites)
    shared = {d for dims in reads for d in dims if d in write}
    read = (*parameter.positions, *(d for dims in reads for d in dims if d not in shared))
    write = tuple(d for d in write if d not in shared)
    batch = tuple(d for d in range(len(parameter.cut_shape)) if d not in (*read, *write))
    count, rows, columns = (math.prod(parameter.cut_shape[d] for d in dims) for dims in (batch, read, write))
    return (*batch, *read, *write), (count, rows, columns)


def orthogonalize(parameter: Parameter, value: Float[Array, "..."]) -> Float[Array, "..."]:
    """Replace the singular values of a kernel (:func:`is_kernel`) by about ``sqrt(max(1, d_out / d_in))``.

    By the Newton-Schulz iteration of Muon (Jordan et al. 2024) in optax, whose factor for the width this is: the step
    it gives then changes a layer's output by about the same, however wide it is.
    """
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    # Muon without its momentum is the iteration by itself.
    muon = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=axes)
    stack = as_stack(parameter, value)
    # Scaled first: the iteration divides by the norm with an epsilon that would matter to small gradients.
    stack = stack / jnp.maximum(jnp.abs(stack).max((1, 2), keepdims=True), jnp.finfo(stack.dtype).tiny)
    orthogonal: Array = muon.update(stack, muon.init(stack))[0]
    return from_stack(parameter, orthogonal * math.sqrt(max(1.0, stack.shape[2] / stack.shape[1])))
