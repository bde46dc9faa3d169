"""Shaping of the loss differences that evolution strategies weigh their perturbations with."""

import jax.numpy as jnp
from jaxtyping import Array, Float

SHAPINGS = ("none", "ranks", "clip")
"""What :func:`shape_differences` can do to the differences."""

CLIP_AT = 3.0
"""``"clip"`` cuts differences at this multiple of their median absolute value."""


def shape_differences(differences: Float[Array, "pairs"], shaping: str) -> Float[Array, "pairs"]:
    """Tame outliers among the pairs' loss differences.

    A pair whose unrolls part for good (one of them diverges, or it meets another minimum) has a difference a hundred
    times that of the others, and the estimate is then that pair's perturbation. Shaping makes the estimate robust
    against this, and biased: it no longer follows the mean loss, but something between mean and median. The signs stay,
    and with them the antithetic form. A difference of zero says nothing (with the objective ``"final"`` most windows
    have none) and is left out of medians and ranks.

    Args:
        differences: loss of each pair's positive unroll less that of its negative one; finite.
        shaping: ``"none"``; ``"ranks"``: each difference is replaced by its sign times the centred rank, in (0, 1), of
            its absolute value (the centred ranks of the set of all differences and their negatives; Salimans et al.
            2017, arXiv:1703.03864), times twice the median absolute difference, so that the scale of the estimate
            stays; ``"clip"``: differences are clipped at :data:`CLIP_AT` times their median absolute value.
    """
    if shaping == "none":
        return differences
    sizes = jnp.abs(differences)
    counts = sizes > 0
    median = jnp.nan_to_num(jnp.nanmedian(jnp.where(counts, sizes, jnp.nan)))
    if shaping == "clip":
        return jnp.clip(differences, -CLIP_AT * median, CLIP_AT * median)
    below = ((sizes[None] < sizes[:, None]) & counts).sum(axis=1)
    equal = ((sizes[None] == sizes[:, None]) & counts).sum(axis=1)
    ranks = (below + 0.5 * equal) / jnp.maximum(counts.sum(), 1)
    return 2 * median * jnp.sign(differences) * ranks
