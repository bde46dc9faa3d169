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

*Layers that write a residual stream* (:func:`.denoised_layers.residual_kernels`) take another step. What they add is
read by all layers behind them, and a step that follows the signal alone moves the few directions that all examples
share. So there the tangents are made white as well, with ``G = E_S[g g^T]`` damped, as K-FAC does, and the momentum is
orthogonalised in between, without regard to noise: ``C^-1 M (G^-1 M^T C^-1 M)^-1/2 G^-1``, that is
``L^-T orth(X) K^-1`` of ``X = L^-1 M K^-T`` and ``G = K K^T``.

What stands on both sides of ``M`` (:mod:`.preconditioners`) changes slowly, so it is computed anew in the first ten
steps, and at every fifth step from then on (as Shampoo and its kin do); on a processor it would be most of the cost
otherwise. Of large models a part of it is due at each step (:mod:`.spreading`). Whoever differentiates a step takes it
for a constant.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gmn_lopt.optimizers.directions.common_factor import Comparison, common_factor
from gmn_lopt.optimizers.directions.denoised_layers import LayerGroup, Sets
from gmn_lopt.optimizers.directions.moments import column, per_matrix
from gmn_lopt.optimizers.directions.preconditioners import (
    DAMPING,
    LARGE,
    TINY,
    Preconditioner,
    as_read,
    multiply,
    new_preconditioners,
)
from gmn_lopt.optimizers.directions.spreading import Part, due, parts, put, take, times_due
from gmn_lopt.util.stacks import inner_products

# Of a step whose effect on the outputs is lost in rounding: as if activations were this small beside their mean square.
LEAST_CHANGE = 1e-6


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

    turns = parts(groups)

    def one(
        old: Any, sets: Any, momenta: Any, step: Array, comparisons: tuple[Comparison, ...]
    ) -> tuple[Preconditioner, ...]:
        for turn in range(len(turns)):
            compute = partial(_computed, turns, turn, sets, momenta, step, comparisons)
            old = _once(due(step, turn, len(turns)), compute, old)
        return old

    if jax.default_backend() == "cpu":
        # One model after the other under vmap, so that nothing is computed where it is not due. An accelerator has room
        # for all of them at once.
        one = jax.custom_batching.sequential_vmap(one)
    # Inverses of short factors, as accelerators round float32's by default, would be off by more than they are worth.
    with jax.default_matmul_precision("highest"):
        new: tuple[Preconditioner, ...] = one(tuple(old), sets, momenta, step, comparisons)
    return new


# No argument has a derivative: not old, sets, momenta, step or comparisons.
update_preconditioners.defvjp(lambda *args: (update_preconditioners(*args), None), lambda *args: (None,) * 5)


def _computed(
    turns: Sequence[Sequence[Part]],
    turn: int,
    sets: Sequence[Sets],
    momenta: Sequence[Float[Array, "_ _ _"]],
    step: Int[Array, ""],
    comparisons: Sequence[Comparison],
    old: tuple[Preconditioner, ...],
) -> tuple[Preconditioner, ...]:
    """The preconditioners after the turn of these parts."""
    members, large = turns[turn], len(turns) > 1
    groups = tuple(part.group for part in members)
    read = [part.sets_of(sets[part.position]) for part in members]
    matrices = [take(momenta[part.position], part.matrices) for part in members]
    largest = _largest([a for group, s in zip(groups, read) if group.reads_neurons for a in s[0]], large)
    factor = common_factor(comparisons)
    # What is not finite, or has squares that are not, is left out.
    usable = jnp.isfinite(largest) & (factor * _largest([g for s in read for g in s[1]], large) < LARGE)
    usable &= _largest(matrices, large) < LARGE * jnp.maximum(1.0, largest)

    def new(old: tuple[Preconditioner, ...]) -> tuple[Preconditioner, ...]:
        before = [_of_part(old[part.position], part, take) for part in members]
        made = new_preconditioners(groups, before, read, matrices, step, times_due(step, turn), largest, factor, large)
        states = list(old)
        for part, new in zip(members, made):
            states[part.position] = _of_part(states[part.position], part, put, new)
        return tuple(states)

    return _once(usable, new, old)


def _of_part(whole: Preconditioner, part: Part, function: Callable[..., Array], *new: Preconditioner) -> Preconditioner:
    """:func:`take` or :func:`put` of each array: some are of distinct activations, others of matrices."""
    of_matrices = {"noise", "root", "tangents"}
    places = [part.matrices if name in of_matrices else part.activations for name in Preconditioner._fields]
    of_part: list[Any] = []
    for values, at, *more in zip(whole, places, *new):
        of_part.append(None if values is None else function(values, at, *more))
    return Preconditioner(*of_part)


def _once(when: Array, function: Callable[[Any], Any], old: Any) -> Any:
    """``function(old)`` or ``old``: a loop of one turn or none; a ``cond`` would copy the results of both branches."""
    turn = lambda carry: (function(carry[0]), jnp.zeros((), bool))  # noqa: E731
    return jax.lax.while_loop(lambda carry: carry[1], turn, (old, when))[0]


def _largest(arrays: Sequence[Float[Array, "..."]], large: bool) -> Float[Array, ""]:
    """The largest absolute value; of large arrays without a copy, of small ones in one operation."""
    if not arrays:
        return jnp.zeros((), jnp.float32)
    if large:
        return jnp.stack([jnp.abs(x).max(initial=0.0) for x in arrays]).max()
    return jnp.abs(jnp.concatenate([x.ravel() for x in arrays])).max(initial=0.0)


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
        if preconditioner.tangents is not None:
            momentum = momentum @ preconditioner.tangents
        rights.append(momentum @ root if group.tall else jnp.einsum("kji,kjo->kio", root, momentum))
        steps.append(multiply(group, as_read(group, preconditioner.inverse), rights[-1]))
    # The change of the outputs is <step, C step>, and with A the damped C / scale^2, right = unit^2 A step. Entry by
    # entry: of two sums that are almost equal, where activations are small beside the bias's, rounding would be left.
    units = [as_read(group, p.unit) for group, p in zip(groups, preconditioners)]
    rests = [right / column(u**2, right) - DAMPING * step for right, step, u in zip(rights, steps, units, strict=True)]
    counts = [len(group.reads) for group in groups]
    unit = jnp.concatenate(units)
    scale = jnp.concatenate([as_read(group, p.scale) for group, p in zip(groups, preconditioners)])
    outputs = jnp.concatenate([per_matrix(group.layers, lambda layer: layer.outputs) for group in groups])
    products = inner_products(steps, rests)
    change = jnp.maximum(products[:, 0, 1], LEAST_CHANGE * products[:, 0, 0]) * unit**2 / outputs
    size = jax.lax.rsqrt(change + 1e-20) / jnp.maximum(scale / unit, TINY)
    sizes = jnp.split(jnp.where(scale > 0, size, 0.0), np.cumsum(counts)[:-1])
    return [step * column(size, step) for step, size in zip(steps, sizes)]
