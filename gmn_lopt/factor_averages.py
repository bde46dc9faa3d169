"""The channels that GradMetaNet reads in a learned optimizer: the current factors and their moving averages."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmn_lopt.features import DECAYS, update_averages
from gmn_lopt.set_subset import subset_size
from gmn_lopt.structure import Factors, GradientStructure

# For each activation, and each tangent, ``[6, S, d]``; None for token ids, of which there are no averages.
Averages = tuple[tuple[Float[Array, "_ _ _"] | None, ...], tuple[Float[Array, "_ _ _"] | None, ...]]


def init_factor_averages(structure: GradientStructure, max_set_size: int | None) -> Averages:
    """Zeros for every factor but token ids.

    Args:
        structure: the structure of the model.
        max_set_size: the largest number of set elements that are read.
    """

    def zeros(shape: tuple[int, int]) -> jax.Array:
        return jnp.zeros((len(DECAYS), subset_size(shape[0], max_set_size), shape[1]), jnp.float32)

    ids = structure.token_ids
    activations = tuple(None if i in ids else zeros(shape) for i, shape in enumerate(structure.activation_shapes))
    return activations, tuple(map(zeros, structure.tangent_shapes))


def factor_channels(averages: Averages, factors: Factors) -> tuple[Factors, Averages]:
    """Advance the averages by the current factors.

    Returns:
        The channels, factors ``[7, S, d]`` of which the first is the current one (token ids, which no site reads, stay
        as they are), and the new averages.
    """
    current = (factors.activations, factors.tangents)
    new = tuple(
        tuple(None if a is None else update_averages(a, x) for a, x in zip(*pair, strict=True))
        for pair in zip(averages, current, strict=True)
    )
    channels = (
        tuple(x if a is None else jnp.concatenate([x[None], a]) for a, x in zip(*pair, strict=True))
        for pair in zip(new, current, strict=True)
    )
    return Factors(*channels), (new[0], new[1])
