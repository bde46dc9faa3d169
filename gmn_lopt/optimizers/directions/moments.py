"""The second moments of a set of factors: what the layers of a group read, and the noise of their gradients."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from gmn_lopt.optimizers.directions.denoised_layers import DenoisedLayer, LayerGroup, Sets, activations_and_noise
from gmn_lopt.util.stacks import inner_products, one_stack

# Rows of a set of a large model that are read: at least so many, fewer than twice as many.
ROWS = 1024


def moments_of_set(
    group: LayerGroup,
    sets: Sets,
    unit: Float[Array, ""],
    factor: Float[Array, ""],
    damping: float,
    some: Int[Array, ""] | None,
) -> tuple[Float[Array, "u ..."], Float[Array, "k ..."]]:
    """The moments of one step.

    Args:
        group: the layers.
        sets: their activations and tangents, per element.
        unit: activations are divided by it before they are squared.
        factor: by what the gradient has been multiplied after the factors were computed.
        damping: of the activations' moment.
        some: a number that chooses rows, other ones each time; None: all rows are read.

    Returns:
        ``E_S[a a^T] / unit^2`` of each activation, and of each matrix ``sum_s g_s g_s^T`` at the scale of the batch
        loss, which is what the noise of its gradient consists of, or its trace: what a
        :class:`.preconditioners.Preconditioner` keeps the averages of, in any shape.
    """
    scaled = (tuple(a / unit for a in sets[0]), sets[1]) if group.reads_neurons else sets
    activations, rows = activations_and_noise(group, scaled, damping)
    counts = [stack.shape[1] for stack in rows for _ in range(len(stack))]
    if some is not None:
        activations, rows = ([_some_rows(stack, some) for stack in stacks] for stacks in (activations, rows))
    covariance = _second_moments(group, activations, unit)
    taken = [stack.shape[1] for stack in rows for _ in range(len(stack))]
    together = one_stack(rows, max(taken), group.outputs)
    sums = (
        jnp.einsum("ksi,ksj->kij", together, together)
        if group.tall or group.residual
        else inner_products([together], [together])[:, 0, 0]
    )
    scale = factor / jnp.asarray(np.sqrt(np.multiply(counts, taken)), jnp.float32)
    return covariance, column(scale**2, sums) * sums


def _some_rows(stack: Num[Array, "k S n"], times: Int[Array, ""]) -> Num[Array, "k R n"]:
    """Every so manieth row, of all if there are few; beginning with another one each time."""
    size = stack.shape[1]
    every = size // ROWS
    if every < 2:
        return stack
    number = size // every
    first = times % (size - every * (number - 1))
    return jnp.take(stack, first + every * jnp.arange(number), axis=1)


def _second_moments(group: LayerGroup, stacks: Sequence[Num[Array, "_ _ _"]], unit: Array) -> Float[Array, "u ..."]:
    if not group.reads_neurons:
        of_readers = zip(group.readers, stacks, strict=True)
        return jnp.concatenate([layer.kind.second_moment(rows, group.inputs) for layer, rows in of_readers])
    lengths = [stack.shape[1] for stack in stacks for _ in range(len(stack))]
    counts = jnp.asarray(lengths, jnp.float32)[:, None, None]
    rows = one_stack(stacks, max(lengths), group.blocks * group.rows)
    biased = [layer.bias is not None for layer in group.readers]
    if any(biased):
        place = per_matrix(group.readers, lambda layer: layer.inputs - 1 if layer.bias is not None else -1)
        at_bias = jnp.arange(rows.shape[2]) == place[:, None, None]
        added = jnp.where(jnp.arange(rows.shape[1])[:, None] < counts, 1.0, 0.0)
        if any(layer.unbiased for layer in group.readers):
            is_read = per_matrix(group.readers, lambda layer: bool(layer.unbiased)) > 0
            added = jnp.where(is_read[:, None, None], rows, added)
        rows = jnp.where(at_bias, added / unit, rows)
    if group.diagonal:
        return jnp.sum(rows**2, axis=1) / counts[:, 0]
    if group.blocks > 1:
        rows = rows.reshape(*rows.shape[:2], group.blocks, group.rows).transpose(0, 2, 1, 3)
        rows = rows.reshape(-1, *rows.shape[2:])
        counts = jnp.repeat(counts, group.blocks, axis=0)
    return rows.mT @ rows / counts


def per_matrix(layers: Sequence[DenoisedLayer], number: Callable[[DenoisedLayer], int]) -> Float[Array, " k"]:
    """A number of each layer, for each of its matrices."""
    return jnp.asarray([number(layer) for layer in layers for _ in range(layer.count)], jnp.float32)


def column(values: Float[Array, "k ..."], like: Float[Array, "k ..."]) -> Float[Array, "k ..."]:
    """A number for each matrix, with axes of length one to multiply the matrices by; matrices as they are."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
