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
is worth is in docs/meta_training.md.

What stands on both sides of ``M`` changes slowly, so it is computed anew in the first ten steps, and at every fifth
step from then on (as Shampoo and its kin do); on a processor it would be most of the cost otherwise. Whoever
differentiates a step takes it for a constant.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from gmn_lopt.optimizers.directions.denoised_layers import LayerGroup, Sets, activations_and_noise

# Of the momentum, of the moments of the set, and how much of the mean of C's diagonal is added to it.
MOMENTUM_DECAY, MOMENTS_DECAY, DAMPING = 0.8, 0.95, 0.5
# The preconditioner is new in the first EARLY steps and every EVERY steps.
EARLY, EVERY = 10, 5
# The Newton-Schulz polynomials a x + b x^3 + c x^5 of Polar Express (Amsel et al. 2025, arXiv:2505.16932).
POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
ROOM = 1.01  # the polynomials want singular values below one
SMALLEST = 1e-18  # its square is still a float32


class Preconditioner(NamedTuple):
    """What the sets of factors of a group's layers look like, and what follows from it; zeros before the first step.

    For ``k`` matrices that read ``u`` distinct activations.

    Attributes:
        activation: moving average of ``C = E_S[a a^T]``, ``[u, inputs, inputs]``; where that is a diagonal (of
            embeddings), ``[u, inputs]``.
        noise: moving average of ``sum_s g_s (x) g_s``, ``[k, outputs, outputs]``, or where there are more outputs than
            inputs of its trace, ``[k]``.
        scale: the mean of ``C``'s diagonal.
        inverse: the inverse of ``C / scale``, damped; likewise.
        root: the inverse root of signal and noise, ``[k, outputs, outputs]`` or ``[k, inputs, inputs]``, up to a factor
            such that it takes the momentum to numbers of ordinary size.
    """

    activation: Float[Array, "u ..."]
    noise: Float[Array, "k ..."]
    scale: Float[Array, " u"]
    inverse: Float[Array, "u ..."]
    root: Float[Array, "k n n"]


def init_preconditioner(group: LayerGroup) -> Preconditioner:
    """Zeros."""
    distinct, count = sum(group.read.values()), len(group.reads)
    moment = (distinct, group.inputs) if group.kind.has_diagonal_moment else (distinct, group.inputs, group.inputs)
    small = min(group.inputs, group.outputs)
    noise = (count, group.outputs, group.outputs) if group.tall else (count,)
    shapes = (moment, noise, (distinct,), moment, (count, small, small))
    return Preconditioner(*(jnp.zeros(shape, jnp.float32) for shape in shapes))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def update_preconditioners(
    old: Sequence[Preconditioner],
    groups: tuple[LayerGroup, ...],
    sets: Sequence[Sets],
    momenta: Sequence[Float[Array, "_ _ _"]],
    step: Int[Array, ""],
) -> tuple[Preconditioner, ...]:
    """Compute the preconditioners of a step, where they are due.

    Args:
        old: those of the step before.
        groups: the layers.
        sets: activations and tangents of each group (:func:`read_sets`), float32, per element.
        momenta: the momentum of each group's layers as matrices, corrected for its start.
        step: number of steps taken before.
    """

    # One model after the other under vmap, so that nothing is computed where it is not due.
    @jax.custom_batching.sequential_vmap
    def one(old: Any, sets: Any, momenta: Any, step: Array) -> tuple[Preconditioner, ...]:
        def compute(carry: Any) -> Any:
            new = (_new(*group, step) for group in zip(groups, carry[0], sets, momenta))
            return tuple(new), jnp.zeros((), bool)

        # A loop of one turn or none, for what it carries stays where it is; both branches of a cond copy their results.
        due = (step < EARLY) | (step % EVERY == 0)
        return jax.lax.while_loop(lambda carry: carry[1], compute, (old, due))[0]

    new: tuple[Preconditioner, ...] = one(tuple(old), sets, momenta, step)
    return new


# No argument has a derivative: not old, sets, momenta or step.
update_preconditioners.defvjp(lambda *args: (update_preconditioners(*args), None), lambda *args: (None,) * 4)


def _new(
    group: LayerGroup,
    old: Preconditioner,
    sets: Sets,
    momentum: Float[Array, "k i o"],
    step: Int[Array, ""],
) -> Preconditioner:
    activations, rows = activations_and_noise(group, sets, DAMPING)
    current = (
        jnp.concatenate([_second_moment(group, activation) for activation in activations]),
        jnp.concatenate([_noise(group, noisy) for noisy in rows]),
    )
    times = jnp.minimum(step + 1, EARLY) + jnp.maximum(0, (step - EARLY) // EVERY + 1)
    # A moving average that is corrected for its start as it goes.
    weight = (1 - MOMENTS_DECAY) / (1 - MOMENTS_DECAY ** times.astype(jnp.float32))
    covariance, moment = (m + weight * (x - m) for m, x in zip(old[:2], current))

    diagonal = covariance if covariance.ndim == 2 else jnp.diagonal(covariance, axis1=1, axis2=2)
    scale = diagonal.mean(1)
    white = covariance / _column(jnp.maximum(scale, jnp.finfo(jnp.float32).tiny), covariance)
    # One after the other: on a processor, factorisations of stacks of matrices can wait for each other's threads for
    # ever (seen with JAX 0.10.2 on two cores: five models with layers of 193 and 129 inputs in one vmap).
    inverse = 1 / (white + DAMPING) if white.ndim == 2 else jax.lax.map(_damped_inverse, white)
    reads = jnp.array(group.reads)
    noise = noise_left(step + 1) * moment * _column(scale[reads], moment)  # as the inverse is that of C / scale
    # The root matters up to a factor only; squares of small gradients would vanish.
    largest = jnp.sqrt(noise.max((1, 2)) if group.tall else noise)
    size = _column(jnp.maximum(jnp.maximum(jnp.abs(momentum).max((1, 2)), largest), SMALLEST), momentum)
    momentum, noise = momentum / size, _column(noise, momentum) / size / size
    natural = _times(inverse[reads], momentum)
    if group.tall:
        root = _inverse_root(momentum.mT @ natural + group.inputs * noise)
    else:
        root = _inverse_root(natural @ momentum.mT + noise * jnp.eye(group.inputs, dtype=noise.dtype))
    return Preconditioner(covariance, moment, scale, inverse, root / size)


def _second_moment(group: LayerGroup, activation: Num[Array, "count S n"]) -> Float[Array, "count ..."]:
    if group.biased:
        activation = jnp.pad(activation, ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
    return group.kind.second_moment(activation, group.inputs)


def _noise(group: LayerGroup, rows: Float[Array, "count R o"]) -> Float[Array, "count ..."]:
    # At the scale of the batch loss, sum_s g_s g_s^T, which is what the noise of its gradient consists of.
    scaled = rows / rows.shape[1]
    return scaled.mT @ scaled if group.tall else jnp.sum(scaled**2, axis=(1, 2))


def _damped_inverse(white: Float[Array, "n n"]) -> Float[Array, "n n"]:
    identity = jnp.eye(len(white), dtype=white.dtype)
    factor = jax.scipy.linalg.cho_factor(white + DAMPING * identity, lower=True)
    return jax.scipy.linalg.cho_solve(factor, identity)


def noise_left(steps: Int[Array, ""]) -> Float[Array, ""]:
    """What the bias-corrected momentum averages the variance of independent noise down by: its squared weights' sum."""
    power = MOMENTUM_DECAY ** steps.astype(jnp.float32)
    return (1 - MOMENTUM_DECAY) / (1 + MOMENTUM_DECAY) * (1 + power) / (1 - power)


def denoised_steps(
    group: LayerGroup, preconditioner: Preconditioner, momentum: Float[Array, "k inputs outputs"]
) -> Float[Array, "k inputs outputs"]:
    """The steps of layers, of a size such that each changes its outputs on the data by a root mean square of one.

    The momentum may be of any size.
    """
    chex.assert_shape(momentum, (len(group.reads), group.inputs, group.outputs))
    reads = jnp.array(group.reads)
    root = preconditioner.root
    # C^-1 M R = C^-1 (M R), and from the other side R C^-1 M = C^-1 (R^T M), for R is a function of C^-1 M M^T.
    right = momentum @ root if group.tall else root.mT @ momentum
    step = _times(preconditioner.inverse[reads], right)
    # The change of the outputs is <step, C step>, and with A the damped C / scale, right = A step.
    change = jnp.sum(step * (right - DAMPING * step), axis=(1, 2)) * preconditioner.scale[reads] / group.outputs
    return step * _column(jax.lax.rsqrt(jnp.maximum(change, 0.0) + 1e-20), step)


def _times(matrices: Float[Array, "k ..."], right: Float[Array, "k i o"]) -> Float[Array, "k i o"]:
    """Products with matrices, which are vectors where they are diagonal."""
    return matrices[..., None] * right if matrices.ndim == 2 else matrices @ right


def _column(values: Float[Array, "k ..."], like: Float[Array, "k ..."]) -> Float[Array, "k ..."]:
    """A number for each matrix, with axes of length one to multiply the matrices by; matrices as they are."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _inverse_root(gram: Float[Array, "k n n"]) -> Float[Array, "k n n"]:
    """About ``G^-1/2``, up to a factor, by a Newton-Schulz iteration.

    With ``G = X^T X`` the iteration ``X <- X (a + b X^T X + c (X^T X)^2)`` takes ``X`` to ``X G^-1/2``, multiplying it
    by polynomials in ``G`` only, which can be collected without ``X``. ``G`` need not be symmetric: on the side of the
    inputs it is ``C^-1 M M^T`` plus a multiple of the identity, similar to ``X X^T`` plus the same.
    """
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    trace = jnp.trace(gram, axis1=1, axis2=2)
    gram = gram / _column(jnp.maximum(ROOM * trace, jnp.finfo(gram.dtype).tiny), gram)
    root = identity
    for a, b, c in POLYNOMIALS:
        factor = a * identity + (b * identity + c * gram) @ gram
        root, gram = root @ factor, factor @ gram @ factor
    return root
