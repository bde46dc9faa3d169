"""The features of the neurons of sites that share one set, and the means that GradMetaNet's layers take of them."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gmn_lopt.factors.structure import Factors, GradientStructure
from gmn_lopt.networks.encoding import encode_sites

EPSILON = 1e-5
SLOTS = 2


@dataclass(frozen=True)
class SetGroup:
    """The sites that share one set; their neurons lie side by side in one array ``[S, neurons, features]``.

    Attributes:
        sites: indices into ``GradientStructure.sites``.
        set_size: the number of elements of their set.
        neurons: the number of neurons of all of them.
    """

    sites: tuple[int, ...]
    set_size: int
    neurons: int

    def encodings(self, structure: GradientStructure) -> Float[Array, "neurons encoding"]:
        """The positional encodings of its neurons."""
        encodings = encode_sites(structure)
        return jnp.concatenate([encodings[s] for s in self.sites])


@functools.lru_cache(maxsize=64)
def group_sites(structure: GradientStructure) -> tuple[SetGroup, ...]:
    """Group the sites by the set that their factors run over."""
    by_set: dict[tuple, list[int]] = {}
    for index, site in enumerate(structure.sites):
        by_set.setdefault((site.set_axes, site.set_size), []).append(index)
    return tuple(
        SetGroup(tuple(sites), set_size, sum(structure.sites[s].size for s in sites))
        for (_, set_size), sites in by_set.items()
    )


def group_copies(structure: GradientStructure, sites: Sequence[int]) -> list[list[int]]:
    """The positions in ``sites`` of those that have the same neurons; those without copies are left out."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, site in enumerate(structure.sites[s] for s in sites):
        same = tuple(space for i, space in enumerate(site.spaces) if i not in site.copies)
        groups.setdefault(same, []).append(position)
    return [g for g in groups.values() if len(g) > 1 or structure.sites[sites[g[0]]].copies]


def mean_over_copies(
    structure: GradientStructure, sites: Sequence[int], values: Sequence[Float[Array, "..."]], axis: int
) -> list[Float[Array, "..."] | None]:
    """For each site, the mean over all copies of the same neurons; None for a site without copies.

    Copies are the sites with the same neurons, and the repetitions along a site's own ``copies``; each counts once.
    ``axis`` of the sites' ``values`` runs over neurons; the means have the same shapes.
    """
    means: list[jax.Array | None] = [None] * len(sites)
    for positions in group_copies(structure, sites):
        apart, repeated = {}, {}
        for p in positions:
            site, x = structure.sites[sites[p]], values[p]
            sizes = [structure.spaces[space].size for space in site.spaces]
            apart[p] = x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
            repeated[p] = tuple(axis + i for i in site.copies)
        count = sum(math.prod(apart[p].shape[i] for i in repeated[p]) for p in positions)
        mean = jnp.asarray(sum(apart[p].sum(repeated[p]) for p in positions)) / count
        for p in positions:
            again = jnp.broadcast_to(jnp.expand_dims(mean, repeated[p]), apart[p].shape)
            means[p] = again.reshape(values[p].shape)
    return means


class NeuronFeatures:
    """Features ``[S, neurons, f]`` of one group of sites, inside the network."""

    def __init__(self, structure: GradientStructure, group: SetGroup, values: Float[Array, "S neurons f"]) -> None:
        self.structure, self.group, self.values = structure, group, values

    def set_mean(self) -> Float[Array, "neurons f"]:
        """The mean over the set, ``E_S``."""
        return self.values.mean(0)

    def neuron_mean(self) -> Float[Array, "S f"]:
        """The mean over the neurons of the group, ``E_N``."""
        return self.values.mean(1)

    def product(self, matrix: Float[Array, "f g"]) -> Float[Array, "S neurons g"]:
        """The features times a matrix."""
        # As one matrix, not a stack of S: the CPU's batched product is much slower.
        flat = self.values.reshape(-1, self.values.shape[-1]) @ matrix
        return flat.reshape(*self.values.shape[:-1], -1)

    def per_site(self) -> list[Float[Array, "S _ f"]]:
        """The features cut into the sites of the group."""
        sizes = [self.structure.sites[s].size for s in self.group.sites]
        return jnp.split(self.values, np.cumsum(sizes)[:-1], axis=1)

    def add_copies(self, y: Float[Array, "S neurons g"], matrix: Float[Array, "f g"]) -> Float[Array, "S neurons g"]:
        """Add ``(E_C x) M`` to ``y``, with the mean over the copies of each neuron, where a neuron has copies."""
        products = self._copies_products(matrix)
        if all(product is None for product in products):
            return y
        sizes = [self.structure.sites[s].size for s in self.group.sites]
        filled = [jnp.zeros((len(y), d, y.shape[2]), y.dtype) if p is None else p for p, d in zip(products, sizes)]
        return y + jnp.concatenate(filled, axis=1)

    def after_layer(self, values: Float[Array, "S neurons g"]) -> "NeuronFeatures":
        """The features of the same neurons after a layer."""
        return NeuronFeatures(self.structure, self.group, values)

    def _copies_products(self, matrix: Float[Array, "f g"]) -> list[Float[Array, "S _ g"] | None]:
        """For each site the mean over copies times a matrix; None where there are none."""
        means = mean_over_copies(self.structure, self.group.sites, self.per_site(), axis=1)
        return [None if m is None else m @ matrix for m in means]


class FactorFeatures(NeuronFeatures):
    """Step 0 of :mod:`gmn_lopt.networks.gradmetanet`: for each site the channels of its two slots, normalised.

    The slots are the site's activation and its tangent.

    A one-sided site repeats its only factor in the other slot. Each channel of each site is divided by its root mean
    square over set and neurons (``EPSILON`` inside the root), if ``normalize``. Nothing of this is built: the division
    is folded into the small matrices and means, and a repeated factor is read once, with the sum of its two matrices.
    """

    def __init__(self, structure: GradientStructure, group: SetGroup, factors: Factors, normalize: bool = True) -> None:
        self.structure, self.group = structure, group
        # For each site its distinct factors, each with the slots that it fills.
        self.slots: list[list[tuple[Float[Array, "channels S d"], tuple[int, ...]]]] = []
        for site in (structure.sites[s] for s in group.sites):
            present = [(slot, i) for slot, i in enumerate((site.activation, site.tangent)) if i is not None]
            arrays = [(factors.activations, factors.tangents)[slot][i] for slot, i in present]
            filled = [(slot,) for slot, _ in present] if len(present) == SLOTS else [tuple(range(SLOTS))]
            self.slots.append(list(zip(arrays, filled)))
        scale = lambda x: jax.lax.rsqrt((x**2).mean((1, 2)) + EPSILON) if normalize else jnp.ones(len(x))  # noqa: E731
        self.scales = [[scale(x) for x, _ in slots] for slots in self.slots]

    def set_mean(self) -> Array:  # noqa: D102
        return jnp.concatenate([self._per_site(site, lambda x: x.mean(1)).T for site in range(len(self.slots))])

    def neuron_mean(self) -> Array:  # noqa: D102
        sums = sum(self._per_site(site, lambda x: x.sum(2)) for site in range(len(self.slots)))
        return jnp.asarray(sums).T / self.group.neurons

    def product(self, matrix: Array) -> Array:  # noqa: D102
        rows = jnp.split(matrix, SLOTS)
        sites = []
        for slots, scales in zip(self.slots, self.scales):
            terms = [
                jnp.einsum("csd,cg->sdg", x, scale[:, None] * sum(rows[slot] for slot in filled))
                for (x, filled), scale in zip(slots, scales)
            ]
            sites.append(sum(terms[1:], start=terms[0]))
        return jnp.concatenate(sites, axis=1)

    def _copies_products(self, matrix: Array) -> list[Array | None]:
        copied = {position for group in group_copies(self.structure, self.group.sites) for position in group}
        sites = range(len(self.group.sites))
        values = [self._per_site(i, lambda x: x) if i in copied else jnp.zeros(()) for i in sites]
        means = mean_over_copies(self.structure, self.group.sites, values, axis=2)
        return [None if m is None else jnp.einsum("csd,cg->sdg", m, matrix) for m in means]

    def _per_site(self, site: int, reduce: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """A linear function of a site's normalised channels, channels first, all slots."""
        by_slot = {}
        for (x, filled), scale in zip(self.slots[site], self.scales[site]):
            reduced = reduce(x)
            for slot in filled:
                by_slot[slot] = reduced * scale.reshape(-1, *[1] * (reduced.ndim - 1))
        return jnp.concatenate([by_slot[slot] for slot in range(SLOTS)])
