"""Inverses and inverse roots of positive matrices, of products and a loop: no factorisation, no library.

On a processor JAX's factorisations are those of a BLAS whose threads wait for each other without giving up their cores;
with other work on the machine they took a hundred times longer. What is here is as accurate, and about as fast.

Matrices of about one size are padded to the largest and go through one loop together: a program with one loop for each
size would take long to compile.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gmn_lopt.util.stacks import one_stack

# Rows that are eliminated at once.
PIVOTS = 32
# Matrices of fewer rows than ALIKE times the largest go by themselves, unless all are SMALL.
ALIKE, SMALL = 0.6, 128
# The Newton-Schulz polynomials a x + b x^3 + c x^5 of Polar Express (Amsel et al. 2025, arXiv:2505.16932).
POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115952949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
# Shifts s and weights c with sum_j c_j / (x + s_j) = x^-1/2 up to 1.6 %, for x from 1e-5 to 1: the rational function of
# elliptic functions (Hale, Higham and Trefethen 2008, doi:10.1137/070700607, method 3, with four poles).
SHIFTS = (1.03285224e-05, 0.00052540668, 0.0190328756, 0.968192702)
WEIGHTS = (0.00512556913, 0.026311336, 0.158360662, 1.5692925)
ROOM = 1.01  # the polynomials want singular values below one


def in_stacks(
    function: Callable[[Float[Array, "k n n"], Sequence[int]], Float[Array, "k n n"]],
    stacks: Sequence[Float[Array, "_ _ _"]],
) -> list[Float[Array, "_ _ _"]]:
    """Apply a function of stacks of matrices to many stacks, those of about one size together, padded with zeros.

    The function is also told which stacks they are. It has to take ``diag(A, 0)`` to ``diag(f(A), anything)``.
    """
    order = sorted(range(len(stacks)), key=lambda i: -stacks[i].shape[1])
    together: list[list[int]] = []
    for i in order:
        largest = stacks[together[-1][0]].shape[1] if together else 0
        if together and (largest <= SMALL or stacks[i].shape[1] >= ALIKE * largest):
            together[-1].append(i)
        else:
            together.append([i])
    results: dict[int, Array] = {}
    for members in together:
        n = stacks[members[0]].shape[1]
        made = function(one_stack([stacks[i] for i in members], n, n), members)
        ends = np.cumsum([len(stacks[i]) for i in members])
        for i, part in zip(members, jnp.split(made, ends[:-1])):
            results[i] = part[:, : stacks[i].shape[1], : stacks[i].shape[2]]
    return [results[i] for i in range(len(stacks))]


def inverse(matrices: Float[Array, "k n n"]) -> Float[Array, "k n n"]:
    """Inverses of symmetric positive definite matrices, by Gauss-Jordan elimination of blocks of rows in place.

    Such matrices need no pivoting. With ``D`` the block at the rows ``p``, a step of elimination puts ``D^-1`` in its
    place, ``D^-1 A[p, :]`` beside and ``-A[:, p] D^-1`` above and below it, and takes ``A[:, p] D^-1 A[p, :]`` from the
    rest.
    """
    n = matrices.shape[1]
    if n <= PIVOTS:
        return _eliminate(matrices, 1, lambda pivot: 1 / pivot)
    size = -(-n // PIVOTS) * PIVOTS
    padding = jnp.diag((jnp.arange(size) >= n).astype(matrices.dtype))
    padded = jnp.pad(matrices, ((0, 0), (0, size - n), (0, size - n))) + padding
    return _eliminate(padded, PIVOTS, inverse)[:, :n, :n]


def _eliminate(
    matrices: Float[Array, "k n n"], pivots: int, invert: Callable[[Float[Array, "k p p"]], Float[Array, "k p p"]]
) -> Float[Array, "k n n"]:
    size = matrices.shape[1]

    def step(i: Array, a: Array) -> Array:
        start = i * pivots
        identity = (jnp.arange(size) == start + jnp.arange(pivots)[:, None]).astype(a.dtype)
        others = (jnp.arange(size) // pivots != i).astype(a.dtype)
        rows, columns = (jax.lax.dynamic_slice_in_dim(a, start, pivots, axis) for axis in (1, 2))
        inverted = invert(jax.lax.dynamic_slice_in_dim(rows, start, pivots, 2))
        # One row at a time is a product of numbers, which needs no call of a matrix product.
        times = jnp.multiply if pivots == 1 else jnp.matmul
        right = times(inverted, rows * others + identity)
        left = columns * others[:, None]
        return jax.lax.dynamic_update_slice_in_dim(a * others - times(left, right), right, start, 1)

    done: Array = jax.lax.fori_loop(0, size // pivots, step, matrices)
    return done


def inverse_root(gram: Float[Array, "k n n"]) -> Float[Array, "k n n"]:
    """About ``G^-1/2``, by a Newton-Schulz iteration.

    With ``G = X^T X`` the iteration ``X <- X (a + b X^T X + c (X^T X)^2)`` takes ``X`` to ``X G^-1/2``, multiplying it
    by polynomials in ``G`` only, which can be collected without ``X``. ``G`` need not be symmetric: a product of two
    positive matrices, plus a multiple of the identity, is similar to a symmetric one.
    """
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    size = jnp.maximum(ROOM * jnp.trace(gram, axis1=1, axis2=2), jnp.finfo(gram.dtype).tiny)[:, None, None]

    def step(carry: tuple[Array, Array], polynomial: Array) -> tuple[tuple[Array, Array], None]:
        root, gram = carry
        a, b, c = polynomial
        factor = a * identity + (b * identity + c * gram) @ gram
        return (root @ factor, factor @ gram @ factor), None

    start = jnp.broadcast_to(identity, gram.shape), gram / size
    (root, _), _ = jax.lax.scan(step, start, jnp.asarray(POLYNOMIALS, gram.dtype))
    return root * jax.lax.rsqrt(size)


def inverse_root_of_inverses(
    gram: Float[Array, "k n n"], bound: Float[Array, " k"], metric: Float[Array, "k n n"] | None = None
) -> Float[Array, "k n n"]:
    """About ``(C^-1 B)^-1/2``, a sum of inverses: ``sum_j c_j (B + s_j C)^-1 C``.

    An inverse takes as many operations as one product of matrices. :func:`inverse_root` takes 24 products, and is for
    small matrices, whose kernels are what they cost.

    Args:
        gram: ``B``, symmetric.
        bound: at least the largest eigenvalue of ``C^-1 B``, such as its trace. What is below ``1e-5`` of it counts as
            if it were about that.
        metric: ``C``, symmetric and positive definite; None: the identity.
    """
    size = jnp.maximum(bound, jnp.finfo(gram.dtype).tiny)[:, None, None]
    scaled = gram / size
    base = jnp.eye(gram.shape[-1], dtype=gram.dtype) if metric is None else metric

    def add(total: Array, pole: tuple[Array, Array]) -> tuple[Array, None]:
        shift, weight = pole
        return total + weight * inverse(scaled + shift * base), None

    poles = jnp.asarray(SHIFTS, gram.dtype), jnp.asarray(WEIGHTS, gram.dtype)
    total, _ = jax.lax.scan(add, jnp.zeros_like(gram), poles)
    return (total if metric is None else total @ metric) * jax.lax.rsqrt(size)
