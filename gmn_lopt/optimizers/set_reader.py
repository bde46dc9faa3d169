"""How a learned optimizer feeds GradMetaNet: which of the set it reads, and what it remembers of the sets before.

GradMetaNet reads, for each neuron, the current factors and their moving averages, slot by slot of the set
(arXiv:2507.01649, section 6). Large batches and long sequences would make that expensive, so a bounded random part of
the set will do; and so would logits over a vocabulary, which are left out above a size.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gmn_lopt.factors.spaces import Site, SiteRef, StructureError
from gmn_lopt.factors.structure import Factors, GradientStructure
from gmn_lopt.networks.gradmetanet import GradMetaNetConfig
from gmn_lopt.networks.gradmetanet_pp import GradMetaNetPlusPlusConfig
from gmn_lopt.optimizers.features.paper import DECAYS, update_averages
from gmn_lopt.util.checks import fraction, whole

# For each activation, and each tangent, ``[decays, S, d]``; None for those at no site, such as token ids.
Averages = tuple[tuple[Float[Array, "_ _ _"] | None, ...], tuple[Float[Array, "_ _ _"] | None, ...]]
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class SetReader:
    """GradMetaNet's part of a residual: its architecture, and what it is given to read.

    Attributes:
        network: the architecture, of GradMetaNet or GradMetaNet++.
        max_set_size: the largest number of set elements that are read, a random part of the set at each step; None:
            all.
        max_output_size: the largest number of neurons of an output (logits) that is read; a larger one is left out, and
            no moving averages are kept of it. None: all are read.
        decays: of the moving averages of the factors that are read beside the current ones, slot by slot of the set.
            Without any, ``()``, nothing is kept of a step's set but what the gradient's own averages hold.

    Raises:
        ValueError: in one line, a size that is not a whole number, or a decay that is not at least 0 and below 1.

    Example:
        >>> SetReader(GradMetaNetConfig(width=8), max_set_size=32).decays
        (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
    """

    network: GradMetaNetConfig | GradMetaNetPlusPlusConfig = field(default_factory=GradMetaNetConfig)
    max_set_size: int | None = None
    max_output_size: int | None = 512
    decays: tuple[float, ...] = DECAYS

    def __post_init__(self) -> None:
        for name in ("max_set_size", "max_output_size"):
            if getattr(self, name) is not None:
                whole(self, name, most=LARGEST)
        fraction(self, "decays")

    def reads(self, structure: GradientStructure) -> bool:
        """Whether there is anything to read: a parameter that lies at a site."""
        return any(p.sites for p in self.structure_read(structure).parameters)

    def structure_read(self, structure: GradientStructure) -> GradientStructure:
        """The structure with the sites that are read, of the same parameters and factors."""
        return _without_large_outputs(structure, self.max_output_size)

    def module(self, structure: GradientStructure) -> nn.Module:
        """The network, on the channels that :meth:`advance` makes."""
        return self.network.module(self.structure_read(structure), 1 + len(self.decays))

    def init(self, structure: GradientStructure) -> Averages:
        """Zeros for every factor that some site reads; without decays nothing."""
        if not self.decays:
            return (), ()
        read = self.structure_read(structure)

        def zeros(shapes: Sequence[tuple[int, int]], at_sites: set[int | None]) -> tuple[jax.Array | None, ...]:
            sizes = [(len(self.decays), self._count(set_size), d) for set_size, d in shapes]
            return tuple(jnp.zeros(size, jnp.float32) if i in at_sites else None for i, size in enumerate(sizes))

        activations = zeros(read.activation_shapes, {site.activation for site in read.sites})
        return activations, zeros(read.tangent_shapes, {site.tangent for site in read.sites})

    def advance(self, averages: Averages, factors: Factors, step: Int[Array, ""]) -> tuple[Factors, Averages]:
        """Read the factors of a step, and advance the moving averages by them.

        Args:
            averages: the moving averages.
            factors: float32, the tangents at per-element scale.
            step: number of steps taken; it determines which part of the set is read.

        Returns:
            The channels, factors ``[1 + decays, S, d]`` of which the first is the current one (those that no site reads
            stay as they are), and the new averages.

        Raises:
            StructureError: there are averages, and of sets of another size.
        """
        factors = jax.tree.map(lambda x: self._part(x, step), factors)
        if not self.decays:
            return jax.tree.map(lambda x: x[None], factors), averages
        for a, x in zip(sum(averages, ()), jax.tree.leaves(factors), strict=True):
            if a is not None and a.shape[1] != len(x):
                raise StructureError(
                    f"a set of {len(x)} elements is read, but the moving averages belong to the {a.shape[1]} slots of "
                    "the batch that was analysed; keep the batch size, analyse the loss again with a batch of the new "
                    "size, or meta-train with SetReader(decays=()) or a max_set_size that all batches have"
                )
        current = (factors.activations, factors.tangents)
        new = tuple(
            tuple(None if a is None else update_averages(a, x, self.decays) for a, x in zip(*pair, strict=True))
            for pair in zip(averages, current, strict=True)
        )
        activations, tangents = (
            tuple(x if a is None else jnp.concatenate([x[None], a]) for a, x in zip(*pair, strict=True))
            for pair in zip(new, current, strict=True)
        )
        return Factors(activations, tangents), (new[0], new[1])

    def _count(self, set_size: int) -> int:
        """How many elements of a set are read."""
        return set_size if self.max_set_size is None else min(set_size, self.max_set_size)

    def _part(self, x: jax.Array, step: Int[Array, ""]) -> jax.Array:
        """A random part of the set, the same elements of all factors with the same set.

        Systematic sampling: equally spaced elements from a random offset on, another one at each step. Every element is
        taken equally often, so means over the part are unbiased estimates of means over the set.
        """
        size = self._count(len(x))
        if size == len(x):
            return x
        offset = jax.random.randint(jax.random.fold_in(jax.random.key(0), step), (), 0, len(x))
        index = (offset + jnp.arange(size) * len(x) // size) % len(x)
        return jnp.take(x, index, axis=0, mode="clip")


@functools.lru_cache(maxsize=64)
def _without_large_outputs(structure: GradientStructure, largest: int | None) -> GradientStructure:
    """The structure without the sites of outputs above a size.

    An output is a site that is only written, and fixed: the logits, but not queries and keys. What lies at such a site
    is described by its other site (a kernel), or not at all (a bias).
    """

    def left_out(site: Site) -> bool:
        is_output = site.kind == "output" and not structure.is_permutable(site)
        return largest is not None and is_output and site.size > largest

    kept = [i for i, site in enumerate(structure.sites) if not left_out(site)]
    if len(kept) == len(structure.sites):
        return structure
    number = {old: new for new, old in enumerate(kept)}
    parameters = tuple(
        replace(p, sites=tuple(SiteRef(number[ref.site], ref.dims) for ref in p.sites if ref.site in number))
        for p in structure.parameters
    )
    return replace(structure, sites=tuple(structure.sites[i] for i in kept), parameters=parameters)
