"""Many small arrays as few large ones: what they cost is the number of kernels, to run and to compile.

A pad, a slice or a reduction for each array is a kernel for each. Here arrays are laid out one after the other, which
takes no kernel, and read from there, and sums of products are matrix products.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

# A vector of n entries is a matrix [LANES, n / LANES]; a product with one row is compiled like a reduction.
LANES = 8
# Vectors of fewer entries than LARGE are padded, to at most ALIKE times their size, and go together. Those of up to
# SMALL are all alike.
LARGE, ALIKE, SMALL = 65536, 4, 1024


def one_stack(stacks: Sequence[Num[Array, "_ _ _"]], rows: int, columns: int) -> Num[Array, "k rows columns"]:
    """Stacks of matrices as one, those of fewer rows or columns padded with zeros.

    Example:
        >>> one_stack([jnp.ones((1, 1, 2)), jnp.ones((1, 2, 1))], 2, 2)
        Array([[[1., 1.],
                [0., 0.]],
        <BLANKLINE>
               [[1., 0.],
                [1., 0.]]], dtype=float32)
    """
    if all(stack.shape[1:] == stacks[0].shape[1:] for stack in stacks):
        whole = stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)
        missing = rows - whole.shape[1], columns - whole.shape[2]
        return jnp.pad(whole, ((0, 0), (0, missing[0]), (0, missing[1]))) if any(missing) else whole
    flat = jnp.concatenate([stack.ravel() for stack in stacks])
    sizes = np.array([stack.shape[1:] for stack in stacks for _ in range(len(stack))])
    begins = np.cumsum([0, *(height * width for height, width in sizes[:-1])])
    start, height, width = (jnp.asarray(x, jnp.int32)[:, None, None] for x in (begins, *sizes.T))
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (len(sizes), rows, columns), axis) for axis in (1, 2))
    inside = (row < height) & (column < width)
    return jnp.where(inside, flat.at[jnp.where(inside, start + row * width + column, 0)].get(mode="clip"), 0)


def inner_products(x: Sequence[Float[Array, "_ ..."]], y: Sequence[Float[Array, "_ ..."]]) -> Float[Array, "total 2 2"]:
    """``[[<x, x>, <x, y>], [<x, y>, <y, y>]]`` of each pair, for each position of the first axis.

    Example:
        >>> inner_products([jnp.ones((1, 3)), jnp.ones((1, 8, 2))], [jnp.zeros((1, 3)), jnp.ones((1, 8, 2))])[:, 0]
        Array([[ 3.,  0.],
               [16., 16.]], dtype=float32)
    """
    pairs = [(a.reshape(len(a), -1), b.reshape(len(b), -1)) for a, b in zip(x, y, strict=True)]
    if not pairs:
        return jnp.zeros((0, 2, 2), jnp.float32)
    products, order = [], []
    for members in _alike([a.shape[1] for a, _ in pairs]):
        size = -(-max(pairs[i][0].shape[1] for i in members) // LANES) * LANES
        together = (one_stack([pairs[i][side][:, None] for i in members], 1, size) for side in (0, 1))
        a, b = (rows.reshape(-1, LANES, size // LANES) for rows in together)
        products.append(jnp.stack([_by_lanes(a, a), _by_lanes(a, b), _by_lanes(b, b)], axis=1))
        order += members
    sums = jnp.einsum("kpll->kp", jnp.concatenate(products))
    starts = np.cumsum([0] + [len(pairs[i][0]) for i in order])
    places = {i: np.arange(start, end) for i, start, end in zip(order, starts, starts[1:])}
    found = np.concatenate([places[i] for i in range(len(pairs))])
    return sums[found[:, None, None], np.array([[0, 1], [1, 2]])]


def _by_lanes(a: Float[Array, "k l n"], b: Float[Array, "k l n"]) -> Float[Array, "k l l"]:
    return jnp.einsum("kln,kmn->klm", a, b, precision=jax.lax.Precision.HIGHEST)


def _alike(sizes: Sequence[int]) -> list[list[int]]:
    """Positions of what goes together."""
    together: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        largest = sizes[together[-1][0]] if together else LARGE
        if largest < LARGE and (largest <= SMALL or ALIKE * sizes[i] >= largest):
            together[-1].append(i)
        else:
            together.append([i])
    return together
