"""Products of the empirical Fisher matrix with vectors, from factors."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gmn_lopt.curvature.examples import Examples
from gmn_lopt.factors import Factors, StructureError


def empirical_fisher_vector_product(
    loss_fn: Callable[..., Any], params: PyTree, *batch: PyTree
) -> Callable[[PyTree], PyTree]:
    """The map ``v -> F v`` with the empirical Fisher matrix ``F = 1/N sum_n g_n g_n^T`` of a batch.

    The factors are computed once; then each product costs two products of matrices for each layer, half of what a
    forward and a backward derivative would, and holds for any number of vectors: for conjugate gradients, or a power
    iteration. With ``m_n = g_n . v = sum_s a_ns^T V g_ns``, ``F v`` is the gradient whose factors are those of the
    batch, the tangents of example ``n`` multiplied by ``m_n / N``. Neither builds the gradient of an example.
    Of leaves without factors it is the linearised loss of each example that is multiplied, without gradients as well.

    Args:
        loss_fn, params, *batch: as for :func:`gmn_lopt.fisher_diagonal`.

    Returns:
        A linear function, from trees like the parameters to such trees.

    Raises:
        StructureError: as :func:`gmn_lopt.fisher_diagonal` does; and when it is called with another tree.

    Example:
        >>> loss = lambda params, x: jnp.sum(jnp.sin(x @ params["w"]))
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
        >>> product = gmn_lopt.empirical_fisher_vector_product(loss, params, x)
        >>> g = jax.vmap(jax.grad(loss), (None, 0))(params, x[:, None])["w"].reshape(4, 6)
        >>> bool(jnp.allclose(product({"w": jnp.ones((2, 3))})["w"].ravel(), g.T @ (g @ jnp.ones(6)) / 4))
        True
        >>> damped = lambda v: jax.tree.map(lambda x, y: x + 0.1 * y, product(v), v)
        >>> step, _ = jax.scipy.sparse.linalg.cg(damped, {"w": jnp.ones((2, 3))})
    """
    examples = Examples(loss_fn, params, batch)
    factors, rest = jax.vmap(examples.backward)(examples.batch)
    without = sorted(rest)
    linear = _linearized(examples, without) if without else None

    def along(direction: list[Array]) -> Float[Array, "N"]:
        """``g_n . v`` for each example."""

        def of_example(factors: Factors, example: Sequence[PyTree]) -> Float[Array, ""]:
            given = [d if i not in without else jnp.zeros_like(d) for i, d in enumerate(direction)]

            def gradients(tangents: tuple[Array, ...]) -> list[Array]:
                return examples.gradients(Factors(factors.activations, tangents, factors.without_batch), example)

            # Linear in the tangents; its transpose takes a direction to what each layer would write.
            written = jax.linear_transpose(gradients, factors.tangents)(given)[0]
            return jnp.asarray(sum(jnp.vdot(g, u) for g, u in zip(factors.tangents, written)))

        found = jax.vmap(of_example)(factors, examples.batch)
        return found if linear is None else found + linear([direction[i] for i in without])

    transposed = jax.linear_transpose(along, examples.leaves)

    def product(vector: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(vector)
        same: bool = treedef == examples.structure.treedef
        if not same:
            raise StructureError("the vector is not a tree like the parameters")
        for parameter, leaf in zip(examples.structure.parameters, leaves):
            if jnp.shape(leaf) != parameter.shape:
                raise StructureError(
                    f"the vector has {parameter.name} of shape {jnp.shape(leaf)}, the parameters {parameter.shape}"
                )
        given = [jnp.asarray(leaf, like.dtype) for leaf, like in zip(leaves, examples.leaves)]
        return jax.tree.unflatten(treedef, transposed(along(given) / examples.count)[0])

    return product


def _linearized(examples: Examples, indices: Sequence[int]) -> Callable[[list[Array]], Float[Array, "N"]]:
    """The derivative of each example's loss in some of the leaves, as a linear function."""

    def losses(given: list[Array]) -> Float[Array, "N"]:
        leaves = list(examples.leaves)
        for i, leaf in zip(indices, given):
            leaves[i] = leaf
        return examples.losses(leaves)

    derivative: Callable[[list[Array]], Array] = jax.linearize(losses, [examples.leaves[i] for i in indices])[1]
    return derivative
