"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., arXiv:2409.11321, algorithms 3 and 4)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gmn_lopt.evaluation.baselines.base import Scalar, as_matrix, scheduled

FIRST, SECOND, EVERY, EPSILON = 0.95, 0.95, 10, 1e-8  # the authors' defaults
LARGEST_SIDE = 1024
"""Sides of more rows are not rotated, as embeddings of large vocabularies in the paper (there: 10,000)."""


def soap(total_steps: int, learning_rate: Scalar, weight_decay: Scalar) -> optax.GradientTransformation:
    """SOAP with a schedule and AdamW's decoupled weight decay."""
    return optax.chain(
        scale_by_soap(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(scheduled(learning_rate, total_steps)),
    )


class Side(NamedTuple):
    """The preconditioner of one side of a matrix: both ``[n, n]``, or both empty where it is not rotated.

    Attributes:
        moment: moving average of ``G G^T``.
        basis: its eigenvectors, about, in columns; those of the largest eigenvalues first.
    """

    moment: Float[Array, "n n"]
    basis: Float[Array, "n n"]


class SoapState(NamedTuple):
    """The state: for each parameter its momentum, its second moment in the eigenbasis, and its two sides."""

    step: Int[Array, ""]
    first: Any
    second: Any
    sides: tuple[tuple[Side, Side], ...]


def scale_by_soap() -> optax.GradientTransformation:
    """SOAP's direction, without rate and sign.

    The first step only finds the eigenbasis, as in the authors' code: in the basis of one gradient Adam's step would be
    that of rounding errors. Vectors and scalars have Adam's step with the same decays.
    """

    def init(params: Any) -> SoapState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return SoapState(jnp.zeros((), jnp.int32), zeros(), zeros(), tuple(map(_sides, jax.tree.leaves(params))))

    def update(grads: Any, state: SoapState, params: Any = None) -> tuple[Any, SoapState]:
        leaves, treedef = jax.tree.flatten(grads)
        first, second = jax.tree.leaves(state.first), jax.tree.leaves(state.second)
        found = [_step(*of_leaf, state.step) for of_leaf in zip(leaves, first, second, state.sides, strict=True)]
        updates, first, second = (jax.tree.unflatten(treedef, [each[i] for each in found]) for i in range(3))
        sides = tuple(_turn(each[3], state.step) for each in found)
        return updates, SoapState(state.step + 1, first, second, sides)

    return optax.GradientTransformation(init, update)


def _sides(param: Float[Array, "..."]) -> tuple[Side, Side]:
    rows, columns = as_matrix(param).shape if param.ndim > 1 else (0, 0)
    sizes = [n if n <= LARGEST_SIDE else 0 for n in (rows, columns)]
    left, right = (Side(*2 * (jnp.zeros((n, n), param.dtype),)) for n in sizes)
    return left, right


def _step(grad, first, second, sides, count):
    """One parameter's update and its new state, the bases as they were."""
    started = count > 0  # the first step is for the bases only
    g, m, v = map(as_matrix, (grad, first, second))
    m = jnp.where(started, FIRST * m + (1 - FIRST) * g, m)
    v = jnp.where(started, SECOND * v + (1 - SECOND) * _rotated(g, sides) ** 2, v)
    steps = jnp.maximum(count, 1)
    scale = jnp.sqrt(1 - SECOND**steps) / (1 - FIRST**steps)
    turned = scale * _rotated(m, sides) / (jnp.sqrt(v) + EPSILON)
    update = jnp.where(started, _rotated(turned, sides, back=True), 0.0)
    decay = jnp.where(started, SECOND, 0.0)  # the first moment is the first gradient's
    new = tuple(
        Side(decay * side.moment + (1 - decay) * x @ x.T, side.basis) if side.moment.size else side
        for side, x in zip(sides, (g, g.T))
    )
    return *(x.reshape(grad.shape) for x in (update, m, v)), new


def _rotated(x: Float[Array, "n m"], sides: tuple[Side, Side], back: bool = False) -> Float[Array, "n m"]:
    """A matrix in the eigenbasis, or one back from there."""
    left, right = (side.basis.T if back else side.basis for side in sides)
    x = left.T @ x if left.size else x
    return x @ right if right.size else x


def _turn(sides: tuple[Side, Side], count: Int[Array, ""]) -> tuple[Side, Side]:
    """New bases, at the first step and at every tenth."""

    # One run after the other under vmap, so that nothing is decomposed where it is not due.
    @jax.custom_batching.sequential_vmap
    def basis(side: Side, count: Array) -> Array:
        due = [lambda: side.basis, lambda: jnp.linalg.qr(side.moment @ side.basis)[0], lambda: _eigenvectors(side)]
        return jax.lax.switch(jnp.where(count == 0, 2, (count % EVERY == 0).astype(jnp.int32)), due)

    left, right = (Side(s.moment, basis(s, count)) if s.moment.size else s for s in sides)
    return left, right


def _eigenvectors(side: Side) -> Float[Array, "n n"]:
    return jnp.linalg.eigh(side.moment)[1][:, ::-1]
