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
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from gmn_lopt.matrices import as_stack, from_stack, is_kernel
from gmn_lopt.structure import Factors, GradientStructure, Parameter

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


@dataclass(frozen=True)
class DenoisedLayer:
    """A layer that takes this step.

    Attributes:
        kernel: position of the kernel among the leaves that are handled.
        bias: position of the bias, or None.
        activation: index into ``Factors.activations``.
        tangent: index into ``Factors.tangents``.
        inputs: number of inputs, the bias's included.
        outputs: number of outputs.
        embedding: whether the activations are token ids.
    """

    kernel: int
    bias: int | None
    activation: int
    tangent: int
    inputs: int
    outputs: int
    embedding: bool

    @property
    def tall(self) -> bool:
        """Whether the smaller side is that of the outputs."""
        return self.outputs <= self.inputs


class Preconditioner(NamedTuple):
    """What a layer's set of factors looks like, and what follows from it for the step; zeros before the first step.

    Attributes:
        activation: moving average of ``C = E_S[a a^T]``, ``[inputs, inputs]``; of an embedding its diagonal,
            ``[inputs]``.
        noise: moving average of ``sum_s g_s (x) g_s``, ``[outputs, outputs]``, or where there are more outputs than
            inputs of its trace, ``[]``.
        scale: the mean of ``C``'s diagonal.
        inverse: the inverse of ``C / scale``, damped; of an embedding its diagonal.
        root: the inverse root of signal and noise, ``[outputs, outputs]`` or ``[inputs, inputs]``, up to a factor such
            that it takes the momentum to numbers of ordinary size.
    """

    activation: Float[Array, "..."]
    noise: Float[Array, "..."]
    scale: Float[Array, ""]
    inverse: Float[Array, "..."]
    root: Float[Array, "n n"]


def denoised_layers(structure: GradientStructure, indices: Sequence[int]) -> tuple[DenoisedLayer, ...]:
    """The layers to which this applies: kernels that one layer uses and that are one matrix from site to site.

    Args:
        structure: the structure of the model.
        indices: the parameters that are handled; a layer of which one is missing is left out.
    """
    kernels, biases = ([getattr(layer, name) for layer in structure.layers] for name in ("kernel", "bias"))
    position = {index: i for i, index in enumerate(indices)}
    found = []
    for layer in structure.layers:
        kernel = structure.parameters[layer.kernel]
        bias = layer.bias if layer.bias is None or biases.count(layer.bias) == 1 else None
        handled = layer.kernel in position and (bias is None or bias in position)
        if kernels.count(layer.kernel) > 1 or not handled:
            continue
        if layer.embedding:
            if not _is_table(kernel) or bias is not None:
                continue
            inputs, outputs = kernel.shape
        else:
            dims = sorted(d for ref in kernel.sites for d in ref.dims)
            if not is_kernel(kernel) or dims != list(range(len(kernel.cut_shape))):
                continue
            read, write = (structure.sites[ref.site] for ref in kernel.sites)
            if read.activation != layer.activation:
                continue
            inputs, outputs = read.size + (bias is not None), write.size
        places = position[layer.kernel], None if bias is None else position[bias]
        found.append(DenoisedLayer(*places, layer.activation, layer.tangent, inputs, outputs, layer.embedding))
    return tuple(found)


def _is_table(parameter: Parameter) -> bool:
    """Whether an embedding's kernel is a matrix with a row for each token."""
    return len(parameter.shape) == 2 and len(parameter.sites) == 1 and 0 not in parameter.sites[0].dims


def init_preconditioner(layer: DenoisedLayer) -> Preconditioner:
    """Zeros."""
    square = (layer.inputs,) if layer.embedding else (layer.inputs, layer.inputs)
    small = min(layer.inputs, layer.outputs)
    noise = (layer.outputs, layer.outputs) if layer.tall else ()
    return Preconditioner(*map(jnp.zeros, (square, noise, (), square, (small, small))))


def as_matrix(
    layer: DenoisedLayer, parameters: Sequence[Parameter], leaves: Sequence[Array]
) -> Float[Array, "inputs outputs"]:
    """The kernel and the bias of a layer as one matrix.

    Args:
        layer: the layer.
        parameters: the parameters that are handled.
        leaves: arrays of their shapes.
    """
    if layer.embedding:
        return leaves[layer.kernel]
    places = [layer.kernel] if layer.bias is None else [layer.kernel, layer.bias]
    return jnp.concatenate([as_stack(parameters[i], leaves[i])[0] for i in places])


def from_matrix(
    layer: DenoisedLayer, parameters: Sequence[Parameter], matrix: Float[Array, "inputs outputs"]
) -> dict[int, Array]:
    """Undo :func:`as_matrix`: the leaves, by position."""
    if layer.embedding:
        return {layer.kernel: matrix}
    if layer.bias is None:
        return {layer.kernel: from_stack(parameters[layer.kernel], matrix[None])}
    rows = zip((layer.kernel, layer.bias), jnp.split(matrix, [layer.inputs - 1]))
    return {i: from_stack(parameters[i], part[None]) for i, part in rows}


def update_preconditioners(
    old: Sequence[Preconditioner],
    layers: tuple[DenoisedLayer, ...],
    factors: Factors,
    momenta: Sequence[Float[Array, "_ _"]],
    step: Int[Array, ""],
) -> tuple[Preconditioner, ...]:
    """Compute the preconditioners of a step, where they are due.

    Args:
        old: those of the step before.
        layers: the layers.
        factors: float32, the tangents at per-element scale.
        momenta: the momentum of each layer as one matrix, corrected for its start.
        step: number of steps taken before.
    """
    sets = tuple((factors.activations[layer.activation], factors.tangents[layer.tangent]) for layer in layers)
    return _constant(layers, tuple(old), sets, tuple(momenta), step)


def _new(
    layer: DenoisedLayer,
    old: Preconditioner,
    factors: tuple[Num[Array, "S n"], Float[Array, "S o"]],
    momentum: Float[Array, "i o"],
    step: Int[Array, ""],
) -> Preconditioner:
    activation, tangent = factors
    # At the scale of the batch loss, sum_s g_s g_s^T, which is what the noise of its gradient consists of.
    scaled = tangent / len(tangent)
    current = _second_moment(layer, activation), scaled.T @ scaled if layer.tall else jnp.sum(scaled**2)
    times = jnp.minimum(step + 1, EARLY) + jnp.maximum(0, (step - EARLY) // EVERY + 1)
    # A moving average that is corrected for its start as it goes.
    weight = (1 - MOMENTS_DECAY) / (1 - MOMENTS_DECAY ** times.astype(jnp.float32))
    covariance, moment = (m + weight * (x - m) for m, x in zip(old[:2], current))

    diagonal = covariance if layer.embedding else jnp.diagonal(covariance)
    scale = diagonal.mean()
    white = covariance / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    if layer.embedding:
        inverse = 1 / (white + DAMPING)
    else:
        factor = jax.scipy.linalg.cho_factor(white + DAMPING * jnp.eye(layer.inputs), lower=True)
        inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(layer.inputs))
    noise = noise_left(step + 1) * moment * scale  # as the inverse is that of C / scale
    # The root matters up to a factor only; squares of small gradients would vanish.
    size = jnp.maximum(jnp.maximum(jnp.abs(momentum).max(), jnp.sqrt(noise.max())), SMALLEST)
    momentum, noise = momentum / size, noise / size / size
    natural = _times(inverse, momentum)
    if layer.tall:
        root = _inverse_root(momentum.T @ natural + layer.inputs * noise)
    else:
        root = _inverse_root(natural @ momentum.T + noise * jnp.eye(layer.inputs))
    return Preconditioner(covariance, moment, scale, inverse, root / size)


# One model after the other under vmap, so that nothing is computed where it is not due. Also, on a processor,
# factorisations of stacks of matrices can wait for each other's threads for ever (seen with JAX 0.10.2 on two cores:
# five models with layers of 193 and 129 inputs in one vmap).
def _when_due(layers: tuple[DenoisedLayer, ...], *args: Any) -> tuple[Preconditioner, ...]:
    @jax.custom_batching.sequential_vmap
    def one(old: Any, sets: Any, momenta: Any, step: Array) -> tuple[Preconditioner, ...]:
        def compute(carry: Any) -> Any:
            new = (_new(*layer, step) for layer in zip(layers, carry[0], sets, momenta))
            return tuple(new), jnp.zeros((), bool)

        # A loop of one turn or none, for what it carries stays where it is; both branches of a cond copy their results.
        due = (step < EARLY) | (step % EVERY == 0)
        return jax.lax.while_loop(lambda carry: carry[1], compute, (old, due))[0]

    new: tuple[Preconditioner, ...] = one(*args)
    return new


# No argument has a derivative: not old, sets, momenta or step.
_constant = jax.custom_vjp(_when_due, nondiff_argnums=(0,))
_constant.defvjp(lambda layers, *args: (_when_due(layers, *args), None), lambda layers, saved, tangent: (None,) * 4)


def _second_moment(layer: DenoisedLayer, activation: Num[Array, "S n"]) -> Float[Array, "..."]:
    if layer.embedding:
        return jnp.zeros(layer.inputs).at[activation[:, 0]].add(1.0 / len(activation))
    if layer.bias is not None:
        activation = jnp.concatenate([activation, jnp.ones((len(activation), 1))], axis=1)
    return (activation.T @ activation) / len(activation)


def noise_left(steps: Int[Array, ""]) -> Float[Array, ""]:
    """What the bias-corrected momentum averages the variance of independent noise down by: its squared weights' sum."""
    power = MOMENTUM_DECAY ** steps.astype(jnp.float32)
    return (1 - MOMENTUM_DECAY) / (1 + MOMENTUM_DECAY) * (1 + power) / (1 - power)


def denoised_step(
    layer: DenoisedLayer, preconditioner: Preconditioner, momentum: Float[Array, "inputs outputs"]
) -> Float[Array, "inputs outputs"]:
    """The step of a layer, of a size such that it changes the layer's outputs on the data by a root mean square of one.

    Args:
        layer: the layer.
        preconditioner: its preconditioner.
        momentum: the momentum as one matrix, of any size.
    """
    # C^-1 M R = C^-1 (M R), and from the other side R C^-1 M = C^-1 (R^T M), for R is a function of C^-1 M M^T.
    right = momentum @ preconditioner.root if layer.tall else preconditioner.root.T @ momentum
    step = _times(preconditioner.inverse, right)
    # The change of the outputs is <step, C step>, and with A the damped C / scale, right = A step.
    change = preconditioner.scale * (jnp.vdot(step, right) - DAMPING * jnp.vdot(step, step)) / layer.outputs
    return step * jax.lax.rsqrt(jnp.maximum(change, 0.0) + 1e-20)


def _times(matrix: Float[Array, "..."], right: Float[Array, "i o"]) -> Float[Array, "i o"]:
    """The product with a matrix, which is a vector where it is diagonal."""
    return matrix[:, None] * right if matrix.ndim == 1 else matrix @ right


def _inverse_root(gram: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """About ``G^-1/2``, up to a factor, by a Newton-Schulz iteration.

    With ``G = X^T X`` the iteration ``X <- X (a + b X^T X + c (X^T X)^2)`` takes ``X`` to ``X G^-1/2``, multiplying it
    by polynomials in ``G`` only, which can be collected without ``X``. ``G`` need not be symmetric: on the side of the
    inputs it is ``C^-1 M M^T`` plus a multiple of the identity, similar to ``X X^T`` plus the same.
    """
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    gram = gram / jnp.maximum(ROOM * jnp.trace(gram), jnp.finfo(gram.dtype).tiny)
    root = identity
    for a, b, c in POLYNOMIALS:
        factor = a * identity + (b * identity + c * gram) @ gram
        root, gram = root @ factor, factor @ gram @ factor
    return root
