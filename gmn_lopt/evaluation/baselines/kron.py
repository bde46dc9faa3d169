"""PSGD-Kron: a Kronecker-factored preconditioner that whitens, learned on a Lie group (Li, arXiv:2402.11858)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int

from gmn_lopt.evaluation.baselines.base import Scalar, as_matrix, scheduled

MOMENTUM, RATE, RMS = 0.9, 0.1, 1.1  # the authors' defaults; RMS is the largest of one tensor's update
LARGEST_SIDE = 1024
"""Sides of more rows have a diagonal factor, as have vectors (the authors: 8,192)."""
TINY = 1e-30


def kron(total_steps: int, learning_rate: Scalar, weight_decay: Scalar) -> optax.GradientTransformation:
    """PSGD-Kron with a schedule and AdamW's decoupled weight decay."""
    return optax.chain(
        scale_by_kron(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(scheduled(learning_rate, total_steps)),
    )


class KronState(NamedTuple):
    """The state: momentum, and for each parameter, as a matrix, two factors.

    A factor is upper triangular, ``[n, n]``, or diagonal, ``[n]``. With factors ``Q`` and ``R`` the preconditioner of
    ``X`` is ``Q^T Q X R^T R``.
    """

    step: Int[Array, ""]
    momentum: Any
    factors: tuple[tuple[Float[Array, "..."], Float[Array, "..."]], ...]


def scale_by_kron() -> optax.GradientTransformation:
    """PSGD-Kron's direction, without rate and sign: momentum, whitened by factors that were fitted to it."""

    def init(params: Any) -> KronState:
        factors = tuple(map(_identities, jax.tree.leaves(params)))
        return KronState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), factors)

    def update(grads: Any, state: KronState, params: Any = None) -> tuple[Any, KronState]:
        momentum = jax.tree.map(lambda m, g: MOMENTUM * m + (1 - MOMENTUM) * g, state.momentum, grads)
        correction = 1 - MOMENTUM ** (state.step + 1)
        leaves, treedef = jax.tree.flatten(momentum)
        matrices = [as_matrix(leaf) / correction for leaf in leaves]
        factors = _maybe_fit(state.factors, matrices, state.step)
        whitened = [_clip(_times(q.T, _times(q, x, r), r.T)) for x, (q, r) in zip(matrices, factors, strict=True)]
        updates = jax.tree.unflatten(treedef, [x.reshape(leaf.shape) for x, leaf in zip(whitened, leaves)])
        return updates, KronState(state.step + 1, momentum, factors)

    return optax.GradientTransformation(init, update)


def probability(count: Int[Array, ""]) -> Float[Array, ""]:
    """The part of the steps at which the factors are fitted: 1 up to step 500, then falling to 0.03 at step 4,000."""
    return jnp.clip(jnp.exp(-0.001 * (count - 500)), 0.03, 1.0)


def _identities(param: Float[Array, "..."]) -> tuple[Array, Array]:
    shape, of_a_matrix = as_matrix(param).shape, param.ndim > 1
    one, other = (jnp.eye(n) if of_a_matrix and n <= LARGEST_SIDE else jnp.ones(n) for n in shape)
    return one, other


def _times(q: Array, x: Float[Array, "n m"], r: Array) -> Float[Array, "n m"]:
    """``Q X R^T``, of triangular or diagonal factors."""
    x = q @ x if q.ndim == 2 else q[:, None] * x
    return x @ r.T if r.ndim == 2 else x * r


def _solved(q: Array, x: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """``Q^-T X``."""
    return solve_triangular(q, x, trans="T") if q.ndim == 2 else x / q[:, None]


@jax.custom_batching.sequential_vmap  # one run after the other, so that nothing is fitted where it is not due
def _maybe_fit(factors: Any, matrices: Any, count: Int[Array, ""]) -> Any:
    """New factors, at some of the steps, which the step's number chooses."""
    due, *keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(matrices) + 1)

    def fitted() -> Any:
        return tuple(fit(*of_leaf, key) for of_leaf, key in zip(zip(factors, matrices), keys))

    return jax.lax.cond(jax.random.uniform(due) < probability(count), fitted, lambda: factors)


def fit(factors: tuple[Array, Array], x: Float[Array, "n m"], key: jax.Array) -> tuple[Array, Array]:
    """One step of both factors towards those for which the preconditioned ``x`` is white.

    The criterion is ``x^T P x + v^T P^-1 v`` with a random ``v``, whose minimum has ``P E[x x^T] P = 1``; a step
    multiplies a factor by a matrix of its own group, triangular or diagonal.

    Args:
        factors: the factors before.
        x: the momentum, as a matrix.
        key: to draw ``v`` with.
    """
    q, r = factors
    a = _times(q, x, r)
    b = _solved(r, _solved(q, jax.random.normal(key, x.shape)).T).T
    q, r = _stepped(q, a, b), _stepped(r, a.T, b.T)
    # Only the product counts: of equal size neither factor runs away.
    balance = jnp.sqrt(jnp.abs(r).max() / jnp.abs(q).max())
    return q * balance, r / balance


def _stepped(q: Array, a: Float[Array, "n m"], b: Float[Array, "n m"]) -> Array:
    if q.ndim == 1:
        plus, minus = (a**2).sum(axis=1), (b**2).sum(axis=1)
        return q - RATE * (plus - minus) / ((plus + minus).max() + TINY) * q
    plus, minus = a @ a.T, b @ b.T
    return q - RATE / (_norm(plus + minus) + TINY) * jnp.triu(plus - minus) @ q


def _norm(x: Float[Array, "n n"]) -> Float[Array, ""]:
    """A lower bound of a symmetric matrix' spectral norm, by one power iteration from its largest row."""
    row = x[jnp.argmax((x**2).sum(axis=0))]
    return jnp.linalg.norm(x @ (row / (jnp.linalg.norm(row) + TINY)))


def _clip(x: Float[Array, "n m"]) -> Float[Array, "n m"]:
    return x / jnp.maximum(1.0, jnp.sqrt(jnp.mean(x**2)) / RMS)
