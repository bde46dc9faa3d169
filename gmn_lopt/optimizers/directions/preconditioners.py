"""What stands on both sides of the momentum in a denoised step, from a set of factors; see :mod:`.denoising`.

Of small models all is computed as it stands. Of large ones (:func:`.spreading.parts`) three things are done for less:
moments are those of some rows of the set, others each time; roots are sums of a few inverses; and where the smaller
side is that of the inputs, the matrix under the root is made symmetric, which inverses need: with ``C = E_S[a a^T]``
damped, and ``B = M M^T``, ``(C^-1 B + n)^-1/2`` is a sum of ``(B + (n + s) C)^-1 C`` over shifts ``s``. So it is on the
side of the tangents where these are white too, with ``G`` in place of ``C``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gmn_lopt.optimizers.directions.denoised_layers import LayerGroup, Sets
from gmn_lopt.optimizers.directions.moments import column, moments_of_set, per_matrix
from gmn_lopt.util.inverses import in_stacks, inverse, inverse_root, inverse_root_of_inverses

# Of the momentum, of the moments of the set, and how much of the mean of C's diagonal is added to it.
MOMENTUM_DECAY, MOMENTS_DECAY, DAMPING = 0.8, 0.95, 0.25
# How much of the mean of the diagonal is added to the moment of the tangents, in residual streams.
TANGENT_DAMPING = 0.1
# How much of the mean of the squared singular values is added to each in residual streams, where nothing else is: what
# is smaller is rounding, which would be made as large as the rest.
FLOOR = 1e-4
# Activations above this are divided by a unit before they are squared: float32 ends at 3e38.
LARGE = 1e15
TINY = float(jnp.finfo(jnp.float32).tiny)


class Preconditioner(NamedTuple):
    """What the sets of factors of a group's layers look like, and what follows from it; zeros before the first step.

    For ``k`` matrices that read ``u`` distinct activations, cut into ``b`` blocks of ``w`` (:class:`LayerGroup`).

    Attributes:
        activation: moving average of ``C = E_S[a a^T]`` in squares of ``unit``, ``[u, b, w, w]``; where that is a
            diagonal, ``[u, inputs]``.
        noise: moving average of ``sum_s g_s (x) g_s``, ``[k, outputs, outputs]``, or where there are more outputs than
            inputs, and no residual stream, of its trace, ``[k]``.
        unit: 1, or more where activations are so large that their squares would not be finite, ``[u]``; one number for
            those that are computed together.
        scale: the root of the mean of ``C``'s diagonal.
        inverse: the inverse of ``C / scale^2``, damped, divided by ``unit^2``; likewise.
        root: the inverse root of signal and noise, ``[k, outputs, outputs]`` or ``[k, inputs, inputs]``; in residual
            streams of the signal where activations and tangents are white, and times ``tangents`` on the first side.
        tangents: in residual streams the inverse of ``noise``, damped and at a mean of one, ``[k, outputs, outputs]``,
            where ``root`` is on the other side; None elsewhere.
    """

    activation: Float[Array, "u ..."]
    noise: Float[Array, "k ..."]
    unit: Float[Array, " u"]
    scale: Float[Array, " u"]
    inverse: Float[Array, "u ..."]
    root: Float[Array, "k n n"]
    tangents: Float[Array, "k outputs outputs"] | None = None


def init_preconditioner(group: LayerGroup) -> Preconditioner:
    """Zeros."""
    distinct, count = sum(layer.count for layer in group.readers), len(group.reads)
    moment = (distinct, group.inputs) if group.diagonal else (distinct, group.blocks, group.rows, group.rows)
    small = min(group.inputs, group.outputs)
    square = (count, group.outputs, group.outputs)
    noise = square if group.tall or group.residual else (count,)
    shapes = (moment, noise, (distinct,), (distinct,), moment, (count, small, small))
    zeros = Preconditioner(*(jnp.zeros(shape, jnp.float32) for shape in shapes))
    return zeros._replace(tangents=jnp.zeros(square, jnp.float32)) if group.residual and not group.tall else zeros


def new_preconditioners(
    groups: Sequence[LayerGroup],
    old: Sequence[Preconditioner],
    sets: Sequence[Sets],
    momenta: Sequence[Float[Array, "_ _ _"]],
    step: Int[Array, ""],
    times: Int[Array, ""],
    largest: Float[Array, ""],
    factor: Float[Array, ""],
    large: bool,
) -> tuple[Preconditioner, ...]:
    """The preconditioners of groups, computed anew.

    Args:
        groups, old, sets, momenta, step: as :func:`.denoising.update_preconditioners` takes them.
        times: how often they have been computed, this time included.
        largest: the largest neuron among the activations.
        factor: by what the gradient has been multiplied after the factors were computed.
        large: whether the model is large.
    """
    # A moving average that is corrected for its start as it goes.
    weight = jnp.minimum(1.0, (1 - MOMENTS_DECAY) / (1 - MOMENTS_DECAY ** times.astype(jnp.float32)))
    # The unit falls no faster than the average of what it is the unit of.
    units = [
        jnp.maximum(jnp.maximum(1.0, largest / LARGE), p.unit[0] * jnp.sqrt(1 - weight))
        if group.reads_neurons
        else jnp.ones((), jnp.float32)
        for group, p in zip(groups, old)
    ]
    rows = times if large else None
    moments = []
    for group, p, of_group, unit in zip(groups, old, sets, units):
        before = (p.unit[0] / unit) ** 2 * p.activation, p.noise
        now = moments_of_set(group, of_group, unit, factor, DAMPING, rows)
        moments.append([m + weight * (x.reshape(m.shape) - m) for m, x in zip(before, now)])
    inverses = _inverses(groups, [covariance for covariance, _ in moments], units)
    noises = [noise_left(step + 1) * noise for _, noise in moments]
    white = [_tangent_metric(group, noise) for group, (_, noise) in zip(groups, moments)]
    tangents = _tangent_inverses(white)
    if large:
        metrics = [_damped(group, covariance) * unit**2 for group, (covariance, _), unit in zip(groups, moments, units)]
        roots = _roots(groups, noises, inverses, tangents, momenta, metrics, white)
    else:
        of_groups = zip(groups, noises, inverses, tangents, momenta)
        grams = [_gram(group, noise, *i, right, momentum) for group, noise, i, right, momentum in of_groups]
        roots = in_stacks(lambda stack, _: inverse_root(stack), grams)
    new = []
    states = zip(groups, moments, units, inverses, tangents, roots)
    for group, moment, unit, (inverted, scale), right, root in states:
        if right is not None and group.tall:
            root, right = root @ right, None
        covariance, noise = moment
        of_readers = jnp.broadcast_to(unit, scale.shape)
        new.append(Preconditioner(covariance, noise, of_readers, unit * scale, inverted, root, right))
    return tuple(new)


def _tangent_metric(group: LayerGroup, noise: Array) -> Float[Array, "k o o"] | None:
    """Of residual groups the moment of the tangents, at a mean of one and damped."""
    if not group.residual:
        return None
    outputs = per_matrix(group.layers, lambda layer: layer.outputs)
    mean = jnp.maximum(jnp.trace(noise, axis1=1, axis2=2) / outputs, TINY)[:, None, None]
    return noise / mean + TANGENT_DAMPING * jnp.eye(group.outputs, dtype=noise.dtype)


def _tangent_inverses(
    metrics: Sequence[Float[Array, "_ _ _"] | None],
) -> list[Float[Array, "_ _ _"] | None]:
    """The inverses of :func:`_tangent_metric`; None where there is none."""

    def inverted(stack: Float[Array, "k n n"], _: Sequence[int]) -> Float[Array, "k n n"]:
        padded = jnp.diagonal(stack, axis1=1, axis2=2) == 0
        return inverse(stack + padded[:, None] * jnp.eye(stack.shape[1], dtype=stack.dtype))

    found = iter(in_stacks(inverted, [metric for metric in metrics if metric is not None]))
    return [None if metric is None else next(found) for metric in metrics]


def _gram(
    group: LayerGroup,
    noise: Array,
    inverted: Array,
    scale: Array,
    tangents: Array | None,
    momentum: Float[Array, "k i o"],
) -> Float[Array, "k n n"]:
    """``M^T C^-1 M`` and the noise, or from the other side, where that is smaller; see :func:`new_preconditioners`."""
    if group.tall and tangents is not None:
        return _with_floor(group, tangents @ _signal(group, inverted, momentum))
    inputs = per_matrix(group.layers, lambda layer: layer.inputs)
    noise = noise * column(as_read(group, scale) ** 2, noise)
    if group.tall:
        return _signal(group, inverted, momentum) + column(inputs, noise) * noise
    natural = multiply(group, as_read(group, inverted), momentum)
    if tangents is not None:
        return _with_floor(group, jnp.einsum("kio,kjo->kij", natural @ tangents, momentum))
    identity = jnp.eye(group.inputs, dtype=noise.dtype) * (jnp.arange(group.inputs) < inputs[:, None])[:, None]
    return jnp.einsum("kio,kjo->kij", natural, momentum) + column(noise, natural) * identity


def _with_floor(group: LayerGroup, gram: Float[Array, "k n n"]) -> Float[Array, "k n n"]:
    sides = per_matrix(group.layers, lambda layer: min(layer.inputs, layer.outputs))
    own = jnp.eye(gram.shape[1], dtype=gram.dtype) * (jnp.arange(gram.shape[1]) < sides[:, None])[:, None]
    return gram + _floor(group, jnp.trace(gram, axis1=1, axis2=2))[:, None, None] * own


def _floor(group: LayerGroup, trace: Float[Array, " k"]) -> Float[Array, " k"]:
    """What is added to each eigenvalue, of which this is the sum."""
    return FLOOR * trace / per_matrix(group.layers, lambda layer: min(layer.inputs, layer.outputs))


def _signal(group: LayerGroup, inverted: Array, momentum: Float[Array, "k i o"]) -> Float[Array, "k o o"]:
    """``M^T C^-1 M``."""
    return jnp.einsum("kio,kip->kop", momentum, multiply(group, as_read(group, inverted), momentum))


def _roots(
    groups: Sequence[LayerGroup],
    noises: Sequence[Float[Array, "_ ..."]],
    inverses: Sequence[tuple[Float[Array, "_ ..."], Float[Array, " _"]]],
    tangents: Sequence[Float[Array, "_ _ _"] | None],
    momenta: Sequence[Float[Array, "_ _ _"]],
    activations: Sequence[Float[Array, "_ ..."]],
    white: Sequence[Float[Array, "_ _ _"] | None],
) -> list[Float[Array, "_ _ _"]]:
    """The roots of :func:`_gram`, of sums of inverses.

    ``activations`` and ``white`` are the damped moments of which ``inverses`` and ``tangents`` are the inverses.
    """
    grams, bounds, metrics = [], [], []
    of_groups = zip(groups, noises, inverses, tangents, momenta, activations, white)
    for group, noise, (inverted, scale), right, momentum, metric, metric_of_tangents in of_groups:
        if group.tall:
            if right is None:
                gram = _gram(group, noise, inverted, scale, None, momentum)
                bounds.append(jnp.trace(gram, axis1=1, axis2=2))
            else:
                gram = _signal(group, inverted, momentum)
                bounds.append(jnp.sum(gram * right, axis=(1, 2)))
                gram += _floor(group, bounds[-1])[:, None, None] * metric_of_tangents
            metrics.append(metric_of_tangents)
        else:
            metric = _dense(group, as_read(group, metric))
            left = momentum if right is None else momentum @ right
            gram = jnp.einsum("kio,kjo->kij", left, momentum)
            bounds.append(jnp.sum(_dense(group, as_read(group, inverted)) * gram, axis=(1, 2)))
            noise = noise * as_read(group, scale) ** 2 if right is None else _floor(group, bounds[-1])
            gram += noise[:, None, None] * metric
            bounds[-1] += group.inputs * noise
            metrics.append(metric)
        grams.append(gram)

    def roots(stack: Float[Array, "k n n"], members: Sequence[int]) -> Float[Array, "k n n"]:
        bound = jnp.concatenate([bounds[i] for i in members])
        if all(metrics[i] is None for i in members):
            return inverse_root_of_inverses(stack, bound)
        found = []
        for gram, metric in ((grams[i], metrics[i]) for i in members):
            one = jnp.broadcast_to(jnp.eye(stack.shape[1], dtype=stack.dtype), (len(gram), *stack.shape[1:]))
            side = gram.shape[1]
            found.append(one if metric is None else one.at[:, :side, :side].set(metric))
        return inverse_root_of_inverses(stack, bound, jnp.concatenate(found))

    return in_stacks(roots, grams)


def _inverses(
    groups: Sequence[LayerGroup], covariances: Sequence[Float[Array, "_ ..."]], units: Sequence[Float[Array, ""]]
) -> list[tuple[Float[Array, "_ ..."], Float[Array, " _"]]]:
    """Of each group the inverses (:attr:`Preconditioner.inverse`), and the scale in units."""
    whole = [i for i, group in enumerate(groups) if not group.diagonal]

    def damped(stack: Float[Array, "k n n"], members: Sequence[int]) -> Float[Array, "k n n"]:
        traces = jnp.trace(stack, axis1=1, axis2=2)
        means, start = [], 0
        for i in members:
            group = groups[whole[i]]
            of_layers = traces[start : start + len(flat[i])].reshape(-1, group.blocks)
            start += len(flat[i])
            mean = of_layers if group.blocks == 1 else of_layers.sum(1, keepdims=True)
            mean = mean / inputs[whole[i]][:, None]
            scales[whole[i]] = mean[:, 0]
            means.append(jnp.broadcast_to(mean, of_layers.shape).ravel())
        white = stack / jnp.maximum(jnp.concatenate(means), TINY)[:, None, None]
        return inverse(white + DAMPING * jnp.eye(stack.shape[1], dtype=stack.dtype))

    scales: dict[int, Array] = {}
    inputs = [per_matrix(group.readers, lambda layer: layer.inputs) for group in groups]
    flat = [covariances[i].reshape(-1, groups[i].rows, groups[i].rows) for i in whole]
    inverted = dict(zip(whole, in_stacks(damped, flat)))
    for i, (group, covariance) in enumerate(zip(groups, covariances)):
        if group.diagonal:
            scales[i] = covariance.sum(1) / inputs[i]
            inverted[i] = 1 / (covariance / jnp.maximum(scales[i], TINY)[:, None] + DAMPING)
    return [(inverted[i].reshape(c.shape) / units[i] ** 2, jnp.sqrt(scales[i])) for i, c in enumerate(covariances)]


def _damped(group: LayerGroup, covariance: Float[Array, "u ..."]) -> Float[Array, "u ..."]:
    """``C / scale^2`` with damping, of which :attr:`Preconditioner.inverse` is the inverse."""
    inputs = per_matrix(group.readers, lambda layer: layer.inputs)
    if group.diagonal:
        return covariance / jnp.maximum(covariance.sum(1) / inputs, TINY)[:, None] + DAMPING
    mean = jnp.trace(covariance, axis1=2, axis2=3).sum(1) / inputs
    return covariance / jnp.maximum(mean, TINY)[:, None, None, None] + DAMPING * jnp.eye(
        group.rows, dtype=covariance.dtype
    )


def _dense(group: LayerGroup, values: Float[Array, "k ..."]) -> Float[Array, "k n n"]:
    """Matrices that consist of blocks, or are diagonal, with all their entries."""
    n = group.inputs
    if group.diagonal:
        return values[..., None] * jnp.eye(n, dtype=values.dtype)
    if group.blocks == 1:
        return values[:, 0]
    apart = jnp.eye(group.blocks, dtype=values.dtype)[:, None, :, None]
    return (values[:, :, :, None, :] * apart).reshape(len(values), *2 * (group.blocks * group.rows,))[:, :n, :n]


def noise_left(steps: Int[Array, ""]) -> Float[Array, ""]:
    """What the bias-corrected momentum averages the variance of independent noise down by: its squared weights' sum."""
    power = MOMENTUM_DECAY ** steps.astype(jnp.float32)
    return (1 - MOMENTUM_DECAY) / (1 + MOMENTUM_DECAY) * (1 + power) / (1 - power)


def as_read(group: LayerGroup, values: Float[Array, "u ..."]) -> Float[Array, "k ..."]:
    """For each matrix what belongs to the activations that it reads."""
    return values if group.reads == tuple(range(len(values))) else values[jnp.array(group.reads)]


def multiply(group: LayerGroup, matrices: Float[Array, "k ..."], right: Float[Array, "k i o"]) -> Float[Array, "k i o"]:
    """Products with matrices, which consist of blocks, or are diagonal."""
    if group.diagonal:
        return matrices[..., None] * right
    if group.blocks == 1:
        return matrices[:, 0] @ right
    rows = jnp.pad(right, ((0, 0), (0, group.blocks * group.rows - group.inputs), (0, 0)))
    product = matrices @ rows.reshape(len(right), group.blocks, group.rows, -1)
    return product.reshape(rows.shape)[:, : group.inputs]
