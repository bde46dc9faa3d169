"""Orthogonalised steps in the space where a layer's activations are white: the curvature that a set of gradients shows.

Muon orthogonalises the gradient ``a^T g`` of a kernel, whose singular vectors are dominated by the directions in which
the activations are large. With ``C = E_S[a a^T] = L L^T`` the step here is ``L^-T orth(L^-1 M)``: steepest descent
where a step is measured by how much it changes the layer's output on the data (the activation half of K-FAC; Martens
and Grosse 2015, arXiv:1503.05671). The bias is one more row of the kernel, for an activation that is always one, so
that the mean of the activations is whitened away too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmn_lopt.matrices import as_stack, from_stack, is_kernel
from gmn_lopt.structure import GradientStructure, Parameter

DECAY, DAMPING = 0.99, 0.3
# Of Muon's iteration.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


@dataclass(frozen=True)
class WhitenedLayer:
    """A layer whose step is whitened.

    Attributes:
        kernel: position of the kernel among the leaves that are handled.
        bias: position of the bias, or None.
        activation: index into ``Factors.activations``.
        size: number of inputs, the bias's included.
    """

    kernel: int
    bias: int | None
    activation: int
    size: int


def whitened_layers(structure: GradientStructure, indices: Sequence[int]) -> tuple[WhitenedLayer, ...]:
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
        if (
            kernels.count(layer.kernel) > 1
            or layer.kernel not in position
            or (bias is not None and bias not in position)
        ):
            continue
        dims = sorted(d for ref in kernel.sites for d in ref.dims)
        whole = is_kernel(kernel) and dims == list(range(len(kernel.cut_shape)))
        if whole and structure.sites[kernel.sites[0].site].activation == layer.activation:
            size = structure.sites[kernel.sites[0].site].size + (bias is not None)
            place = None if bias is None else position[bias]
            found.append(WhitenedLayer(position[layer.kernel], place, layer.activation, size))
    return tuple(found)


def update_covariance(
    covariance: Float[Array, "d d"], layer: WhitenedLayer, activation: Float[Array, "S n"]
) -> Float[Array, "d d"]:
    """Advance the moving average of ``E_S[a a^T]`` by one set; it starts at zero."""
    if layer.bias is not None:
        activation = jnp.concatenate([activation, jnp.ones((len(activation), 1))], axis=1)
    return DECAY * covariance + (1 - DECAY) * (activation.T @ activation) / len(activation)


def whitened_steps(
    layer: WhitenedLayer, parameters: Sequence[Parameter], momenta: Sequence[Array], covariance: Float[Array, "d d"]
) -> list[tuple[int, Array]]:
    """The steps of a layer's kernel and bias.

    Their size is such that they change the layer's outputs on the data by a root mean square of one.

    Args:
        layer: the layer.
        parameters: the parameters that are handled.
        momenta: their momenta.
        covariance: the average of ``E_S[a a^T]``, corrected for its start.

    Returns:
        ``(position, step)`` of the kernel and, where there is one, the bias.
    """
    places = [layer.kernel] if layer.bias is None else [layer.kernel, layer.bias]
    momentum = jnp.concatenate([as_stack(parameters[i], momenta[i])[0] for i in places])
    # The step does not depend on the momentum's size; squares of a small one would vanish.
    largest = jax.lax.stop_gradient(jnp.abs(momentum).max())
    momentum = momentum / jnp.maximum(largest, jnp.finfo(momentum.dtype).tiny)
    # The curvature is a constant to whoever differentiates the step.
    covariance = jax.lax.stop_gradient(covariance)
    damping = DAMPING * jnp.trace(covariance) / layer.size + jnp.finfo(jnp.float32).tiny
    natural = _solve(covariance + damping * jnp.eye(layer.size), momentum)
    if momentum.shape[0] < momentum.shape[1]:
        root = _inverse_root(natural @ momentum.T)
        step, white = root @ natural, root.T @ momentum
    else:
        root = _inverse_root(momentum.T @ natural)
        step, white = natural @ root, momentum @ root
    # ``white`` is the damped covariance times the step.
    change = jnp.sum(step * (white - damping * step)) / step.shape[1]
    step = step * jax.lax.rsqrt(jnp.maximum(change, 0.0) + 1e-12)
    rows = jnp.split(step, [layer.size - 1]) if layer.bias is not None else [step]
    return [(i, from_stack(parameters[i], part[None])) for i, part in zip(places, rows)]


def _inverse_root(gram: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """About ``G^-1/2``, up to a factor, by Muon's Newton-Schulz iteration (Jordan et al. 2024).

    With ``X = L^-1 M`` and ``G = X^T X = M^T C^-1 M`` the iteration ``X <- X (a + b X^T X + c (X^T X)^2)`` multiplies
    ``X`` by polynomials in ``G`` only, which can be collected without ``L``: ``L^-T orth(X) = C^-1 M G^-1/2``. From the
    other side, ``C^-1 M M^T`` in the place of ``G`` does the same; it is not symmetric, but similar to ``X X^T``.
    """
    a, b, c = COEFFICIENTS
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    gram = gram / jnp.maximum(jnp.trace(gram), jnp.finfo(gram.dtype).tiny)
    root = identity
    for _ in range(ITERATIONS):
        factor = a * identity + (b * identity + c * gram) @ gram
        root, gram = root @ factor, factor @ gram @ factor
    return root


@jax.custom_vjp
def _solve(matrix: Float[Array, "d d"], right: Float[Array, "d n"]) -> Float[Array, "d n"]:
    """``matrix^-1 right`` for a symmetric, positive matrix that nobody differentiates with respect to."""
    return _cholesky_solve(matrix, right)


_solve.defvjp(
    lambda matrix, right: (_cholesky_solve(matrix, right), matrix),
    lambda matrix, tangent: (jnp.zeros_like(matrix), _cholesky_solve(matrix, tangent)),
)


# One model after the other under vmap: on a processor, factorisations of stacks of matrices can wait for each other's
# threads for ever (seen with JAX 0.10.2 on two cores: five models with layers of 193 and 129 inputs in one vmap).
@jax.custom_batching.sequential_vmap
def _cholesky_solve(matrix: Float[Array, "d d"], right: Float[Array, "d n"]) -> Float[Array, "d n"]:
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix, lower=True), right)
