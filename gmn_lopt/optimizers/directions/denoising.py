"""A step for linear layers that reads the set of gradients: white activations, and noise taken out of the momentum.

A layer's gradient is ``sum_s a_s (x) g_s``. Muon replaces the singular values of the momentum ``M`` by one. Two things
that the set of factors shows, and the mean gradient does not, are put right here:

- *Activations are not white.* With ``C = E_S[a a^T] = L L^T`` the step is taken in the space of ``X = L^-1 M``, and
  measured by how much it changes the layer's output on the data: the activation half of K-FAC (Martens and Grosse
  2015, arXiv:1503.05671). The bias is one more row of the kernel, for an activation that is always one, so that the
  mean of the activations is whitened away too. Of an embedding ``C`` is a diagonal, how often each token occurs.
- *Small singular values are mostly noise*, which orthogonalising blows up. The noise of a sum over the set is what its
  elements differ by: where activations and tangents are independent, the noise ``N`` of ``X`` has
  ``E[N^T N] = d sum_s g_s (x) g_s``, and ``E[N N^T] = tr(sum_s g_s (x) g_s) I``, times what the momentum averages it
  down by. So in place of ``orth(X) = X (X^T X)^-1/2`` the step is ``X (X^T X + E[N^T N])^-1/2``, singular values
  ``s / sqrt(s^2 + noise^2)``: one where the gradients agree, ``s / noise`` where they do not. In the limit of noise
  only that is ``C^-1 M G^-1/2``, with K-FAC's covariance of tangents under a root.

The whole is ``C^-1 M (M^T C^-1 M + E[N^T N])^-1/2``, or from the other side, whichever is smaller. It is ours; what it
is worth is in docs/findings.md. Of wide layers ``C`` is cut into blocks (:mod:`.blocks`); ``M^T C^-1 M`` is the sum
over them.

What stands on both sides of ``M`` changes slowly, so it is computed anew in the first ten steps, and at every fifth
step from then on (as Shampoo and its kin do); on a processor it would be most of the cost otherwise. Whoever
differentiates a step takes it for a constant.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from gmn_lopt.optimizers.directions.common_factor import Comparison, common_factor
from gmn_lopt.optimizers.directions.denoised_layers import (
    DenoisedLayer,
    LayerGroup,
    Sets,
    activations_and_noise,
    bias_inputs,
)
from gmn_lopt.util.inverses import in_stacks, inverse, inverse_root
from gmn_lopt.util.stacks import inner_products, one_stack

# Of the momentum, of the moments of the set, and how much of the mean of C's diagonal is added to it.
MOMENTUM_DECAY, MOMENTS_DECAY, DAMPING = 0.8, 0.95, 0.5
# The preconditioner is new in the first EARLY steps and every EVERY steps.
EARLY, EVERY = 10, 5
# Activations above this are divided by a unit before they are squared: float32 ends at 3e38.
LARGE = 1e15
# Of a step whose effect on the outputs is lost in rounding: as if activations were this small beside their mean square.
LEAST_CHANGE = 1e-6
TINY = float(jnp.finfo(jnp.float32).tiny)


class Preconditioner(NamedTuple):
    """What the sets of factors of a group's layers look like, and what follows from it; zeros before the first step.

    For ``k`` matrices that read ``u`` distinct activations, cut into ``b`` blocks of ``w`` (:class:`LayerGroup`).

    Attributes:
        activation: moving average of ``C = E_S[a a^T]`` in squares of ``unit``, ``[u, b, w, w]``; where that is a
            diagonal, ``[u, inputs]``.
        noise: moving average of ``sum_s g_s (x) g_s``, ``[k, outputs, outputs]``, or where there are more outputs than
            inputs of its trace, ``[k]``.
        unit: 1, or more where activations are so large that their squares would not be finite.
        scale: the root of the mean of ``C``'s diagonal.
        inverse: the inverse of ``C / scale^2``, damped, divided by ``unit^2``; likewise.
        root: the inverse root of signal and noise, ``[k, outputs, outputs]`` or ``[k, inputs, inputs]``.
    """

    activation: Float[Array, "u ..."]
    noise: Float[Array, "k ..."]
    unit: Float[Array, ""]
    scale: Float[Array, " u"]
    inverse: Float[Array, "u ..."]
    root: Float[Array, "k n n"]


def init_preconditioner(group: LayerGroup) -> Preconditioner:
    """Zeros."""
    distinct, count = sum(layer.count for layer in group.readers), len(group.reads)
    moment = (distinct, group.inputs) if group.diagonal else (distinct, group.blocks, group.rows, group.rows)
    small = min(group.inputs, group.outputs)
    noise = (count, group.outputs, group.outputs) if group.tall else (count,)
    shapes = (moment, noise, (), (distinct,), moment, (count, small, small))
    return Preconditioner(*(jnp.zeros(shape, jnp.float32) for shape in shapes))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def update_preconditioners(
    old: Sequence[Preconditioner],
    groups: tuple[LayerGroup, ...],
    sets: Sequence[Sets],
    momenta: Sequence[Float[Array, "_ _ _"]],
    step: Int[Array, ""],
    comparisons: tuple[Comparison, ...] = (),
) -> tuple[Preconditioner, ...]:
    """Compute the preconditioners of a step, where they are due.

    Args:
        old: those of the step before.
        groups: the layers.
        sets: activations and tangents of each group (:func:`read_sets`), float32, per element.
        momenta: the momentum of each group's layers as matrices, corrected for its start.
        step: number of steps taken before.
        comparisons: what tells whether the gradient has been rescaled after the factors were computed.
    """

    # One model after the other under vmap, so that nothing is computed where it is not due.
    @jax.custom_batching.sequential_vmap
    def one(
        old: Any, sets: Any, momenta: Any, step: Array, comparisons: tuple[Comparison, ...]
    ) -> tuple[Preconditioner, ...]:
        def compute(old: Any) -> Any:
            neurons = [a for group, s in zip(groups, sets) if group.reads_neurons for a in s[0]]
            largest = _largest(neurons)
            factor = common_factor(comparisons)
            # What is not finite, or has squares that are not, is left out.
            usable = jnp.isfinite(largest) & (factor * _largest([g for s in sets for g in s[1]]) < LARGE)
            usable &= _largest(momenta) < LARGE * jnp.maximum(1.0, largest)
            return _once(usable, lambda old: _new(groups, old, sets, momenta, step, largest, factor), old)

        return _once((step < EARLY) | (step % EVERY == 0), compute, old)

    new: tuple[Preconditioner, ...] = one(tuple(old), sets, momenta, step, comparisons)
    return new


# No argument has a derivative: not old, sets, momenta, step or comparisons.
update_preconditioners.defvjp(lambda *args: (update_preconditioners(*args), None), lambda *args: (None,) * 5)


def _once(when: Array, function: Callable[[Any], Any], old: Any) -> Any:
    """``function(old)`` or ``old``: a loop of one turn or none; a ``cond`` would copy the results of both branches."""
    turn = lambda carry: (function(carry[0]), jnp.zeros((), bool))  # noqa: E731
    return jax.lax.while_loop(lambda carry: carry[1], turn, (old, when))[0]


def _largest(arrays: Sequence[Float[Array, "..."]]) -> Float[Array, ""]:
    """The largest absolute value."""
    if not arrays:
        return jnp.zeros((), jnp.float32)
    return jnp.abs(jnp.concatenate([x.ravel() for x in arrays])).max(initial=0.0)


def _new(
    groups: tuple[LayerGroup, ...],
    old: Sequence[Preconditioner],
    sets: Sequence[Sets],
    momenta: Sequence[Float[Array, "_ _ _"]],
    step: Int[Array, ""],
    largest: Float[Array, ""],
    factor: Float[Array, ""],
) -> tuple[Preconditioner, ...]:
    times = jnp.minimum(step + 1, EARLY) + jnp.maximum(0, (step - EARLY) // EVERY + 1)
    # A moving average that is corrected for its start as it goes.
    weight = (1 - MOMENTS_DECAY) / (1 - MOMENTS_DECAY ** times.astype(jnp.float32))
    # The unit falls no faster than the average of what it is the unit of.
    units = [
        jnp.maximum(jnp.maximum(1.0, largest / LARGE), p.unit * jnp.sqrt(1 - weight))
        if group.reads_neurons
        else jnp.ones((), jnp.float32)
        for group, p in zip(groups, old)
    ]
    moments = [_moments(*of_group, weight, factor) for of_group in zip(groups, old, sets, units)]
    inverses = _inverses(groups, [covariance for covariance, _ in moments], units)
    grams = [
        _gram(group, noise_left(step + 1) * noise, *of_activations, momentum)
        for group, (_, noise), of_activations, momentum in zip(groups, moments, inverses, momenta)
    ]
    roots = in_stacks(lambda stack, _: inverse_root(stack), grams)
    return tuple(
        Preconditioner(*moment, unit, unit * scale, inverted, root)
        for moment, unit, (inverted, scale), root in zip(moments, units, inverses, roots)
    )


def _gram(
    group: LayerGroup, noise: Array, inverted: Array, scale: Array, momentum: Float[Array, "k i o"]
) -> Float[Array, "k n n"]:
    """``M^T C^-1 M`` and the noise, or from the other side, where that is smaller."""
    natural = _times(group, _read(group, inverted), momentum)
    inputs = _per_matrix(group.layers, lambda layer: layer.inputs)
    noise = noise * _column(_read(group, scale) ** 2, noise)
    if group.tall:
        return jnp.einsum("kio,kip->kop", momentum, natural) + _column(inputs, noise) * noise
    identity = jnp.eye(group.inputs, dtype=noise.dtype) * (jnp.arange(group.inputs) < inputs[:, None])[:, None]
    return jnp.einsum("kio,kjo->kij", natural, momentum) + _column(noise, natural) * identity


def _per_matrix(layers: Sequence[DenoisedLayer], number: Callable[[DenoisedLayer], int]) -> Float[Array, " k"]:
    """A number of each layer, for each of its matrices."""
    return jnp.asarray([number(layer) for layer in layers for _ in range(layer.count)], jnp.float32)


def _moments(
    group: LayerGroup, old: Preconditioner, sets: Sets, unit: Array, weight: Array, factor: Array
) -> tuple[Float[Array, "u ..."], Float[Array, "k ..."]]:
    scaled = (tuple(a / unit for a in sets[0]), sets[1]) if group.reads_neurons else sets
    activations, rows = activations_and_noise(group, scaled, DAMPING)
    covariance = _second_moments(group, activations, unit)
    # At the scale of the batch loss, sum_s g_s g_s^T, which is what the noise of its gradient consists of.
    counts = [stack.shape[1] for stack in rows for _ in range(len(stack))]
    together = one_stack(rows, max(counts), group.outputs)
    sums = (
        jnp.einsum("ksi,ksj->kij", together, together)
        if group.tall
        else inner_products([together], [together])[:, 0, 0]
    )
    noise = _column((factor / jnp.asarray(counts, jnp.float32)) ** 2, sums) * sums
    before = (old.unit / unit) ** 2 * old.activation, old.noise
    new = [m + weight * (x.reshape(m.shape) - m) for m, x in zip(before, (covariance, noise))]
    return new[0], new[1]


def _second_moments(group: LayerGroup, stacks: Sequence[Num[Array, "_ _ _"]], unit: Array) -> Float[Array, "u ..."]:
    if not group.reads_neurons:
        of_readers = zip(group.readers, stacks, strict=True)
        return jnp.concatenate([layer.kind.second_moment(rows, group.inputs) for layer, rows in of_readers])
    lengths = [stack.shape[1] for stack in stacks for _ in range(len(stack))]
    counts = jnp.asarray(lengths, jnp.float32)[:, None, None]
    rows = one_stack(stacks, max(lengths), group.blocks * group.rows)
    biased = [layer.bias is not None for layer in group.readers]
    if any(biased):
        place = _per_matrix(group.readers, lambda layer: layer.inputs - 1 if layer.bias is not None else -1)
        at_bias = jnp.arange(rows.shape[2]) == place[:, None, None]
        added = jnp.arange(rows.shape[1])[:, None] < counts
        if any(layer.unbiased for layer in group.readers):
            added &= jnp.asarray(bias_inputs(group, lengths, rows.shape[1]))[:, :, None]
        rows = jnp.where(at_bias & added, 1 / unit, rows)
    if group.diagonal:
        return jnp.sum(rows**2, axis=1) / counts[:, 0]
    if group.blocks > 1:
        rows = rows.reshape(*rows.shape[:2], group.blocks, group.rows).transpose(0, 2, 1, 3)
        rows = rows.reshape(-1, *rows.shape[2:])
        counts = jnp.repeat(counts, group.blocks, axis=0)
    return rows.mT @ rows / counts


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
    inputs = [_per_matrix(group.readers, lambda layer: layer.inputs) for group in groups]
    flat = [covariances[i].reshape(-1, groups[i].rows, groups[i].rows) for i in whole]
    inverted = dict(zip(whole, in_stacks(damped, flat)))
    for i, (group, covariance) in enumerate(zip(groups, covariances)):
        if group.diagonal:
            scales[i] = covariance.sum(1) / inputs[i]
            inverted[i] = 1 / (covariance / jnp.maximum(scales[i], TINY)[:, None] + DAMPING)
    return [(inverted[i].reshape(c.shape) / units[i] ** 2, jnp.sqrt(scales[i])) for i, c in enumerate(covariances)]


def noise_left(steps: Int[Array, ""]) -> Float[Array, ""]:
    """What the bias-corrected momentum averages the variance of independent noise down by: its squared weights' sum."""
    power = MOMENTUM_DECAY ** steps.astype(jnp.float32)
    return (1 - MOMENTUM_DECAY) / (1 + MOMENTUM_DECAY) * (1 + power) / (1 - power)


def denoised_steps(
    groups: Sequence[LayerGroup],
    preconditioners: Sequence[Preconditioner],
    momenta: Sequence[Float[Array, "_ _ _"]],
) -> list[Float[Array, "_ _ _"]]:
    """The steps of layers, of a size such that each changes its outputs on the data by a root mean square of one.

    The momenta ``[k, inputs, outputs]`` of the groups may be of any size.
    """
    rights, steps = [], []
    for group, preconditioner, momentum in zip(groups, preconditioners, momenta):
        chex.assert_shape(momentum, (len(group.reads), group.inputs, group.outputs))
        # C^-1 M R = C^-1 (M R), and from the other side R C^-1 M = C^-1 (R^T M), for R is a function of C^-1 M M^T.
        root = preconditioner.root
        rights.append(momentum @ root if group.tall else jnp.einsum("kji,kjo->kio", root, momentum))
        steps.append(_times(group, _read(group, preconditioner.inverse), rights[-1]))
    # The change of the outputs is <step, C step>, and with A the damped C / scale^2, right = unit^2 A step. Entry by
    # entry: of two sums that are almost equal, where activations are small beside the bias's, rounding would be left.
    rests = [right / p.unit**2 - DAMPING * step for right, step, p in zip(rights, steps, preconditioners, strict=True)]
    counts = [len(group.reads) for group in groups]
    unit = jnp.concatenate([jnp.broadcast_to(p.unit, n) for p, n in zip(preconditioners, counts)])
    scale = jnp.concatenate([_read(group, p.scale) for group, p in zip(groups, preconditioners)])
    outputs = jnp.concatenate([_per_matrix(group.layers, lambda layer: layer.outputs) for group in groups])
    products = inner_products(steps, rests)
    change = jnp.maximum(products[:, 0, 1], LEAST_CHANGE * products[:, 0, 0]) * unit**2 / outputs
    size = jax.lax.rsqrt(change + 1e-20) / jnp.maximum(scale / unit, TINY)
    sizes = jnp.split(jnp.where(scale > 0, size, 0.0), np.cumsum(counts)[:-1])
    return [step * _column(size, step) for step, size in zip(steps, sizes)]


def _read(group: LayerGroup, values: Float[Array, "u ..."]) -> Float[Array, "k ..."]:
    """For each matrix what belongs to the activations that it reads."""
    return values if group.reads == tuple(range(len(values))) else values[jnp.array(group.reads)]


def _times(group: LayerGroup, matrices: Float[Array, "k ..."], right: Float[Array, "k i o"]) -> Float[Array, "k i o"]:
    """Products with matrices, which consist of blocks, or are diagonal."""
    if group.diagonal:
        return matrices[..., None] * right
    if group.blocks == 1:
        return matrices[:, 0] @ right
    rows = jnp.pad(right, ((0, 0), (0, group.blocks * group.rows - group.inputs), (0, 0)))
    product = matrices @ rows.reshape(len(right), group.blocks, group.rows, -1)
    return product.reshape(rows.shape)[:, : group.inputs]


def _column(values: Float[Array, "k ..."], like: Float[Array, "k ..."]) -> Float[Array, "k ..."]:
    """A number for each matrix, with axes of length one to multiply the matrices by; matrices as they are."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
