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

from gmn_lopt.matrices import as_stack, from_stack, is_kernel, orthogonal_factor
from gmn_lopt.structure import GradientStructure, Parameter

DECAY, DAMPING = 0.99, 0.3


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
    # The curvature is a constant to whoever differentiates the step.
    covariance = jax.lax.stop_gradient(covariance)
    damping = DAMPING * jnp.trace(covariance) / layer.size + jnp.finfo(jnp.float32).tiny
    whitening = _inverse_root(covariance + damping * jnp.eye(layer.size))
    step = whitening.T @ orthogonal_factor((whitening @ momentum)[None])[0]
    change = jnp.sum(step * (covariance @ step)) / step.shape[1]
    step = step * jax.lax.rsqrt(change + 1e-12)
    rows = jnp.split(step, [layer.size - 1]) if layer.bias is not None else [step]
    return [(i, from_stack(parameters[i], part[None])) for i, part in zip(places, rows)]


# One model after the other under vmap: on a processor, factorisations of stacks of matrices can wait for each other's
# threads for ever (seen with JAX 0.10.2 on two cores: five models with layers of 193 and 129 inputs in one vmap).
@jax.custom_batching.sequential_vmap
def _inverse_root(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """``L^-1`` of the Cholesky factorisation ``L L^T``."""
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(matrix), identity, lower=True)
