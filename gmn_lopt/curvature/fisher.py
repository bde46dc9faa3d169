"""The diagonal and the trace of the empirical Fisher matrix, from factors.

With ``g_n`` the gradient of example ``n``, the empirical Fisher matrix is ``F = 1/N sum_n g_n g_n^T``
(arXiv:2507.01649, section 7.1). Of a kernel ``g_n = sum_s a_ns (x) g_ns`` over the positions ``s`` inside the example:

- *One position*, as in a multi-layer perceptron: ``diag F = 1/N sum_n a_n^2 (x) g_n^2``, one product of matrices, and
  ``tr F = 1/N sum_n |a_n|^2 |g_n|^2``. No gradient of an example exists at any time.
- *Several positions* (tokens, pixels): the sum over them has to be taken before the square. For the trace that is a
  product of Gram matrices, ``|g_n|^2 = sum_st (a_ns . a_nt) (g_ns . g_nt)``, where those are smaller than the kernel;
  otherwise, and for the diagonal, the gradients of a few examples are built at a time, and added up.
- *All other leaves* (biases, convolutions, kernels that are used twice or computed): the gradients of a few examples at
  a time, from factors as well; those of leaves without factors (scales, tables) from the same backward pass.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gmn_lopt.curvature.examples import Examples
from gmn_lopt.factors import Dense, Embedding, Factors
from gmn_lopt.factors.structure import Layer


def fisher_diagonal(loss_fn: Callable[..., Any], params: PyTree, *batch: PyTree) -> PyTree:
    """The diagonal of the empirical Fisher matrix: the mean over the batch of the squared gradient of each example.

    What ``vmap(grad)``, a square and a mean would give, without the gradients of all examples: of dense layers none is
    built, of others those of a few examples at a time (the text above says when). It costs about one more gradient of
    the batch. Call it under ``jit``. For the Fisher matrix of the model in place of the empirical one, give labels
    drawn from its predictions; for a Gaussian likelihood, a loss that is the model's output.

    Args:
        loss_fn: ``loss_fn(params, *batch)``, a scalar; it is given batches of one example.
        params: the parameters.
        *batch: arrays, or trees of them, with the examples along their first axis. What belongs to no example (a key, a
            flag) the loss function closes over.

    Returns:
        A tree like the parameters.

    Raises:
        StructureError: the arrays have no or unequal numbers of examples; or as :func:`gmn_lopt.analyze` does.

    Example:
        >>> loss = lambda params, x: jnp.sum(jnp.sin(x @ params["w"]))
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
        >>> diagonal = gmn_lopt.fisher_diagonal(loss, params, x)
        >>> each = jax.vmap(jax.grad(loss), (None, 0))(params, x[:, None])
        >>> bool(jnp.allclose(diagonal["w"], (each["w"] ** 2).mean(0)))
        True
    """
    examples = Examples(loss_fn, params, batch)
    products = {
        leaf: layer
        for leaf, layer in examples.single_kernels.items()
        if isinstance(layer.kind, Dense) and examples.positions(layer) == 1
    }
    built = [i for i in range(len(examples.leaves)) if i not in products]

    def of_chunk(chunk: Any, weight: Float[Array, "n"]) -> dict[int, Array]:
        factors, rest = jax.vmap(examples.backward)(chunk)
        found = {leaf: _squares(examples, leaf, layer, factors, weight) for leaf, layer in products.items()}
        for leaf, gradients in _built(examples, built, factors, rest, chunk).items():
            found[leaf] = jnp.einsum("n...,n->...", gradients**2, weight.astype(gradients.dtype))
        return found

    totals = examples.total(of_chunk, sum(examples.leaves[i].size for i in built))
    diagonal = [totals[i] / examples.count for i in range(len(examples.leaves))]
    return jax.tree.unflatten(jax.tree.structure(params), diagonal)


def fisher_trace(loss_fn: Callable[..., Any], params: PyTree, *batch: PyTree) -> Float[Array, ""]:
    """The trace of the empirical Fisher matrix: the mean over the batch of the squared norm of each example's gradient.

    It costs less than :func:`fisher_diagonal`, which it is the sum of: a product of Gram matrices takes the place of
    each kernel's gradient where it is smaller (the text above says when).

    Args:
        loss_fn, params, *batch: as for :func:`fisher_diagonal`.

    Returns:
        A number.

    Raises:
        StructureError: as :func:`fisher_diagonal` does.

    Example:
        >>> loss = lambda params, x: jnp.sum(jnp.sin(x @ params["w"]))
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
        >>> trace = gmn_lopt.fisher_trace(loss, params, x)
        >>> bool(jnp.allclose(trace, gmn_lopt.fisher_diagonal(loss, params, x)["w"].sum()))
        True
    """
    examples = Examples(loss_fn, params, batch)
    grams: dict[int, Layer] = {}
    entries = 0
    for leaf, layer in examples.single_kernels.items():
        matrices = layer.kind.matrices(examples.structure.parameters[leaf])
        positions = examples.positions(layer)
        assert matrices is not None
        smaller = positions * (matrices.inputs + matrices.outputs) < matrices.inputs * matrices.outputs
        if isinstance(layer.kind, Dense | Embedding) and (positions == 1 or smaller):
            grams[leaf] = layer
            entries += 2 * matrices.count * positions**2
    built = [i for i in range(len(examples.leaves)) if i not in grams]

    def of_chunk(chunk: Any, weight: Float[Array, "n"]) -> Array:
        factors, rest = jax.vmap(examples.backward)(chunk)
        norms = [_norms(examples, leaf, layer, factors) for leaf, layer in grams.items()]
        gradients = _built(examples, built, factors, rest, chunk).values()
        norms += [(of_leaf**2).reshape(len(weight), -1).sum(1) for of_leaf in gradients]
        return jnp.asarray(sum(norms)) @ weight

    return examples.total(of_chunk, entries + sum(examples.leaves[i].size for i in built)) / examples.count


def _built(
    examples: Examples, leaves: list[int], factors: Factors, rest: Mapping[int, Array], chunk: Any
) -> dict[int, Float[Array, "n ..."]]:
    """The gradients of some leaves for each of a few examples."""
    if not leaves:
        return {}
    gradients = jax.vmap(examples.gradients)(factors, chunk)
    return {i: rest[i] if i in rest else gradients[i] for i in leaves}


def _squares(
    examples: Examples, leaf: int, layer: Layer, factors: Factors, weight: Float[Array, "n"]
) -> Float[Array, "..."]:
    """``sum_n a_n^2 (x) g_n^2`` of a kernel whose set has one position in each example."""
    kernel = examples.structure.parameters[leaf]
    a = layer.kind.activation_rows(kernel, factors.activations[layer.activation][:, 0])
    g = layer.kind.tangent_rows(kernel, factors.tangents[layer.tangent][:, 0])
    a = a * weight.astype(a.dtype)[None, :, None]  # weights are 0 and 1
    return layer.kind.from_matrices(kernel, (a**2).mT @ g**2).astype(kernel.dtype)


def _norms(examples: Examples, leaf: int, layer: Layer, factors: Factors) -> Float[Array, "n"]:
    """``sum_st (a_ns . a_nt) (g_ns . g_nt)`` of a kernel."""
    kernel = examples.structure.parameters[leaf]
    a = jax.vmap(lambda x: layer.kind.activation_rows(kernel, x))(factors.activations[layer.activation])
    g = jax.vmap(lambda x: layer.kind.tangent_rows(kernel, x))(factors.tangents[layer.tangent])
    # Of a lookup the rows are token ids, which stand for one-hot vectors.
    alike = a @ a.mT if layer.kind.reads_neurons else (a == a.mT).astype(g.dtype)
    return (alike * (g @ g.mT)).sum((1, 2, 3))
