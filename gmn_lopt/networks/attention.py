"""Multi-head attention whose memory grows linearly with the number of elements."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# How many rows of scores exist at a time.
ROWS = 1024


def attention(
    queries: Float[Array, "batch n heads d"],
    keys: Float[Array, "batch n heads d"],
    values: Float[Array, "batch n heads d"],
    rows: int = ROWS,
) -> Float[Array, "batch n heads d"]:
    """Softmax attention of all elements to all, in each batch entry: ``softmax(Q K^T / sqrt(d)) V``.

    The scores are computed for at most ``rows`` queries at a time, and again in the backward pass, so that beside
    arrays of the size of the inputs the memory is ``O(rows n heads)``. Time is ``O(batch n^2 heads d)``.

    Example:
        >>> q = jnp.ones((2, 5, 3, 4))
        >>> attention(q, q, q, rows=2).shape
        (2, 5, 3, 4)
    """
    batch, n, heads, d = queries.shape

    @jax.checkpoint
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(d)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)

    if batch * n <= rows:
        return attend(queries, keys, values)
    together = max(1, min(batch, rows // n))  # batch entries at a time; one, in pieces of queries, where n > rows
    # Equal pieces, filled up with zeros, whose results are dropped.
    entries = math.ceil(batch / together) * together
    grouped = [_padded(x, 0, entries).reshape(-1, together, n, heads, d) for x in (queries, keys, values)]
    pieces = math.ceil(n / rows)
    size = math.ceil(n / pieces)

    def one_group(qkv: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v = qkv
        if pieces == 1:
            return attend(q, k, v)
        split = _padded(q, 1, pieces * size).reshape(together, pieces, size, heads, d)
        parts = jax.lax.map(lambda part: attend(part, k, v), jnp.moveaxis(split, 1, 0))
        return jnp.moveaxis(parts, 0, 1).reshape(together, pieces * size, heads, d)[:, :n]

    return jax.lax.map(one_group, tuple(grouped)).reshape(entries, n, heads, d)[:batch]


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)
