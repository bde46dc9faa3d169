"""The residual: what a network adds to the direction, from features of each parameter entry and of the set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.networks.gradmetanet import init_gradmetanet
from gmn_lopt.networks.initialization import init_weights
from gmn_lopt.networks.pointwise import PointwiseMLP
from gmn_lopt.networks.unf import UNF
from gmn_lopt.optimizers.features import Features, PaperFeatures
from gmn_lopt.optimizers.leaves import Gradient
from gmn_lopt.optimizers.set_reader import SetReader
from gmn_lopt.util.checks import not_negative, positive


class ResidualState(NamedTuple):
    """State of a residual.

    Attributes:
        gradients: moving averages of the gradient: for each parameter an array ``[averages, *shape]``.
        factors: moving averages of the activations and of the tangents (at per-element scale), slot by slot of the set
            (or of the part that is read): arrays ``[decays, S, d]``, None for those that GradMetaNet does not read
            (token ids, large outputs); empty without GradMetaNet.
    """

    gradients: PyTree
    factors: PyTree


@dataclass(frozen=True)
class Residual:
    """``beta F``: a network ``F`` on features of each parameter entry, and on GradMetaNet's features of the set.

    Attributes:
        features: what the network reads of each entry.
        network: a perceptron for each entry by itself (``ds`` in the paper), or one whose last layer mixes all
            parameters (``unf``; its weights belong to one model, of any widths).
        gradmetanet: GradMetaNet, whose output joins the features; None: without.
        weight: where ``beta`` starts.
        output_scale: what the last layer is multiplied by when it is drawn; with 0 the untrained optimizer is its
            direction.

    Raises:
        ValueError: ``weight`` is not positive, or ``output_scale`` negative.

    Example:
        >>> Residual(network=PointwiseMLP(width=8, hidden_layers=2)).gradmetanet is None
        True
    """

    features: Features = field(default_factory=PaperFeatures)
    network: PointwiseMLP | UNF = field(default_factory=PointwiseMLP)
    gradmetanet: SetReader | None = None
    weight: float = 1e-3
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "weight")
        not_negative(self, "output_scale")

    def coefficients(self) -> dict[str, float]:
        """``beta``."""
        return {"beta": self.weight}

    def needs_factors(self, structure: GradientStructure) -> bool:
        """Whether GradMetaNet has something to read in this model."""
        return self.gradmetanet is not None and self.gradmetanet.reads(structure)

    def init_weights(self, key: jax.Array, structure: GradientStructure, outputs: int) -> dict[str, PyTree]:
        """Draw the weights of ``network``, with so many outputs for each entry, and ``gradmetanet`` if there is one.

        Only the last layer of ``UNF`` depends on the structure.
        """
        key_network, key_gradmetanet = jax.random.split(key)
        module: Any = self._module(structure, range(len(structure.parameters)), outputs)
        *kinds, times = self._channels
        features, extra = ([_array(p.size, n) for p in structure.parameters] for n in kinds)
        weights = init_weights(module.init, key_network, features, extra, _array(times))
        last = jax.tree.map(lambda w: self.output_scale * w, weights[module.last_layer])
        drawn = {"network": weights | {module.last_layer: last}}
        if self.gradmetanet is not None:
            drawn["gradmetanet"] = init_gradmetanet(self.gradmetanet.module(structure), key_gradmetanet)
        return drawn

    def init(self, structure: GradientStructure, zeros: PyTree) -> ResidualState:
        """The state before the first step; ``zeros`` are shaped like the parameters."""
        gradients = jax.tree.map(lambda z: jnp.stack([z] * self.features.averages), zeros)
        if self.gradmetanet is None or not self.needs_factors(structure):
            return ResidualState(gradients, ())
        return ResidualState(gradients, self.gradmetanet.init(structure))

    def update(
        self,
        phi: Mapping[str, PyTree],
        gradient: Gradient,
        params: Sequence[Float[Array, "..."]],
        state: ResidualState,
        step: Int[Array, ""],
        outputs: int,
    ) -> tuple[Sequence[Float[Array, "size outputs"]], ResidualState]:
        """Advance the moving averages, and apply the networks.

        Args:
            phi: ``network`` and ``gradmetanet``, as :meth:`init_weights` draws them.
            gradient: the gradient.
            params: the parameters that are handled, float32.
            state: the state.
            step: number of steps taken.
            outputs: number of outputs for each entry.

        Returns:
            The network's outputs for the entries of each parameter in row-major order, and the new state.
        """
        structure, grads = gradient.structure, jax.tree.leaves(gradient.grads)
        averages = [self.features.advance(a, g) for a, g in zip(jax.tree.leaves(state.gradients), grads)]
        remembered, extra = state.factors, [None] * len(grads)
        if self.gradmetanet is not None and self.needs_factors(structure):
            assert gradient.factors is not None
            channels, remembered = self.gradmetanet.advance(state.factors, gradient.factors, step)
            of_set: Any = self.gradmetanet.module(structure).apply({"params": phi["gradmetanet"]}, channels)
            chosen = [of_set[i] for i in gradient.indices]
            extra = [None if x is None else x.reshape(-1, x.shape[-1]) for x in chosen]
        features = [self.features.of_entries(p, g, a, step) for p, g, a in zip(params, grads, averages)]
        made: Any = []
        if features:
            module = self._module(structure, gradient.indices, outputs)
            made = module.apply({"params": phi["network"]}, features, extra, self.features.of_time(step))
        return made, ResidualState(gradient.like_grads(averages), remembered)

    def _module(self, structure: GradientStructure, indices: Sequence[int], outputs: int) -> nn.Module:
        return self.network.module(structure, tuple(indices), *self._channels, outputs)

    @property
    def _channels(self) -> tuple[int, int, int]:
        """The numbers of channels: of each entry, from GradMetaNet, and of the time."""
        extra = 0 if self.gradmetanet is None else self.gradmetanet.network.out_features
        return self.features.channels, extra, self.features.time_channels


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
