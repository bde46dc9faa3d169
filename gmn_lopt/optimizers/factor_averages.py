"""The channels that GradMetaNet reads in a learned optimizer: the current factors and their moving averages."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmn_lopt.factors.structure import Factors, GradientStructure, StructureError
from gmn_lopt.optimizers.features.paper import update_averages
from gmn_lopt.optimizers.set_subset import subset_size

# For each activation, and each tangent, ``[decays, S, d]``; None for those at no site, such as token ids.
Averages = tuple[tuple[Float[Array, "_ _ _"] | None, ...], tuple[Float[Array, "_ _ _"] | None, ...]]


def init_factor_averages(structure: GradientStructure, max_set_size: int | None, decays: Sequence[float]) -> Averages:
    """Zeros for every factor that some site reads; without decays nothing.

    Args:
        structure: the structure of the model, with the sites that are read.
        max_set_size: the largest number of set elements that are read.
        decays: of the averages.
    """
    if not decays:
        return (), ()

    def zeros(shapes: Sequence[tuple[int, int]], read: set[int | None]) -> tuple[jax.Array | None, ...]:
        sizes = [(len(decays), subset_size(set_size, max_set_size), d) for set_size, d in shapes]
        return tuple(jnp.zeros(size, jnp.float32) if i in read else None for i, size in enumerate(sizes))

    activations = zeros(structure.activation_shapes, {site.activation for site in structure.sites})
    return activations, zeros(structure.tangent_shapes, {site.tangent for site in structure.sites})


def factor_channels(averages: Averages, factors: Factors, decays: Sequence[float]) -> tuple[Factors, Averages]:
    """Advance the averages by the current factors.

    Returns:
        The channels, factors ``[1 + decays, S, d]`` of which the first is the current one (those that no site reads
        stay as they are), and the new averages.

    Raises:
        StructureError: there are averages, and of sets of another size.
    """
    if not decays:
        return jax.tree.map(lambda x: x[None], factors), averages
    for a, x in zip(sum(averages, ()), jax.tree.leaves(factors), strict=True):
        if a is not None and a.shape[1] != len(x):
            raise StructureError(
                f"a set of {len(x)} elements is read, but the moving averages belong to the {a.shape[1]} slots of the "
                "batch that was analysed; keep the batch size, analyse the loss again with a batch of the new size, or "
                "meta-train with gradmetanet.factor_decays=() or a max_set_size that all batches have"
            )
    current = (factors.activations, factors.tangents)
    new = tuple(
        tuple(None if a is None else update_averages(a, x, decays) for a, x in zip(*pair, strict=True))
        for pair in zip(averages, current, strict=True)
    )
    channels = (
        tuple(x if a is None else jnp.concatenate([x[None], a]) for a, x in zip(*pair, strict=True))
        for pair in zip(new, current, strict=True)
    )
    return Factors(*channels), (new[0], new[1])
