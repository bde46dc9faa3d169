"""A step size that learns to read the set of gradients: for each tensor a factor of its step and of its weight decay.

Where the number of steps ``T`` is known, tensor ``i`` takes steps of ``alpha s(t / T) exp(f_i)``, and is decayed by
``lambda exp(d_i)``, with the schedule ``s`` of :func:`gmn_lopt.optimizers.horizon.known_horizon`. A perceptron that all
tensors share gives ``(f_i, d_i)``; untrained they are zero, so that learning starts from the schedule. It reads

- of the time: the share of the steps that is taken, its square, and how many there are;
- of the tensor: its size against that of its initialisation, whether the gradient would shrink it, its shape, and
  whether it stands at the model's inputs or outputs;
- of the set, if there is a ``reader``: how far the examples agree, and what GradMetaNet's trunk makes of the factors
  (arXiv:2507.01649, section 5, steps 0 to 4), the mean over its neurons.

Examples agree by ``log(S |E_S g|^2 / E_S |g|^2)``, for the tangents ``g`` at the tensor's outputs, averaged over steps.
It is zero where gradients of examples are independent noise, ``log S`` where they are all equal, and negative where
they cancel. No averaged gradient shows that.

No network looks at single entries, so the cost does not grow with the model. Without ``reader`` it is the control: what
a network learns without the set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from gmn_lopt.factors.structure import Factors, GradientStructure
from gmn_lopt.networks.gradmetanet import GradMetaNetConfig, init_gradmetanet
from gmn_lopt.networks.gradmetanet_pp import GradMetaNetPlusPlusConfig
from gmn_lopt.networks.initialization import init_weights
from gmn_lopt.networks.pointwise import PointwiseMLP
from gmn_lopt.optimizers.horizon import Horizon
from gmn_lopt.optimizers.leaves import Gradient
from gmn_lopt.optimizers.set_reader import SetReader
from gmn_lopt.optimizers.step_size import Sizes
from gmn_lopt.util.stacks import inner_products

BOUND = 1.5  # of the logarithms of both factors
OF_TENSOR, OF_SET, OF_TIME, OUTPUTS = 7, 1, 3, 2
AGREEMENT_DECAY = 0.95
LEAST, MOST = -1.0, 3.0  # of the agreement that counts
TINY = 1e-30


class ControllerState(NamedTuple):
    """What is remembered of the sets.

    Attributes:
        agreement: the moving average of the agreement of each parameter's examples, ``[n]``, not corrected for its
            start.
        factors: GradMetaNet's moving averages (:meth:`SetReader.init`).
    """

    agreement: Float[Array, " n"]
    factors: PyTree


class TensorReader(nn.Module):
    """GradMetaNet's trunk, and for each parameter the mean of the features of the neurons that it lies between.

    Attributes are those of :class:`gmn_lopt.networks.gradmetanet.GradMetaNet`.
    """

    structure: GradientStructure
    config: GradMetaNetConfig | GradMetaNetPlusPlusConfig
    channels: int = 1

    @nn.compact
    def __call__(self, factors: Factors) -> list[Float[Array, " width"]]:
        """A vector for each parameter, zero for one at no site."""
        trunk: Any = self.config.trunk
        neurons = trunk(self.structure, self.config, self.channels, True, name="trunk")(factors)
        means = [x.reshape(-1, x.shape[-1]).mean(0) for x in neurons]
        nothing = jnp.zeros(self.config.width)
        at = [[means[ref.site] for ref in p.sites] for p in self.structure.parameters]
        return [sum(own, nothing) / max(len(own), 1) for own in at]


@dataclass(frozen=True)
class Controlled(Horizon):
    """The step size and the weight decay of each tensor, by a network; see the module.

    Attributes:
        initial, warmup, power, decay: see :class:`Horizon`.
        reader: how the set is read; None: it is not.
        network: the perceptron.

    Example:
        >>> structure = gmn_lopt.analyze(lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones((2, 1)), jnp.ones((8, 2)))
        >>> sorted(Controlled(reader=SetReader()).init_weights(jax.random.key(0), structure))
        ['gradmetanet', 'network']
    """

    reader: SetReader | None = None
    network: PointwiseMLP = field(default_factory=lambda: PointwiseMLP(16, 2))

    def needs_factors(self, structure: GradientStructure) -> bool:
        """Whether there is a reader, and something to read."""
        return self.reader is not None and self.reader.reads(structure)

    def init_weights(self, key: jax.Array, structure: GradientStructure) -> dict[str, PyTree]:
        """Draw the weights: ``network``, whose last layer is zero, and ``gradmetanet`` where there is a reader."""
        key_network, key_reader = jax.random.split(key)
        module: Any = self._module(structure)
        shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
        channels, extra = self._channels
        weights = init_weights(module.init, key_network, [shape(1, channels)], [shape(1, extra)], shape(OF_TIME))
        last = jax.tree.map(jnp.zeros_like, weights[module.last_layer])
        drawn = {"network": weights | {module.last_layer: last}}
        if self.reader is not None:
            drawn["gradmetanet"] = init_gradmetanet(self._tensor_reader(structure), key_reader)
        return drawn

    def init(self, structure: GradientStructure, zeros: PyTree) -> ControllerState | tuple[()]:
        """Zeros; nothing without a reader."""
        if self.reader is None or not self.needs_factors(structure):
            return ()
        return ControllerState(jnp.zeros(len(structure.parameters), jnp.float32), self.reader.init(structure))

    def update(
        self,
        phi: Mapping[str, Any],
        state: Any,
        gradient: Gradient,
        params: Sequence[Float[Array, "..."]],
        step: Int[Array, ""],
        total_steps: int | None,
    ) -> Sizes:
        """The step size and the weight decay of each tensor; see :meth:`StepSize.update`."""
        assert total_steps is not None
        structure, indices = gradient.structure, jnp.array(gradient.indices, int)
        features, extra = of_tensors(gradient, params), None
        if self.reader is not None:
            agreement = jnp.zeros(len(structure.parameters))
            if self.needs_factors(structure):
                assert gradient.factors is not None
                average, agreement = advance_agreement(state.agreement, structure, gradient.factors, step)
                channels, averages = self.reader.advance(state.factors, gradient.factors, step)
                read: Any = self._tensor_reader(structure).apply({"params": phi["gradmetanet"]}, channels)
                extra, state = jnp.stack(read)[indices], ControllerState(average, averages)
            features = jnp.concatenate([features, agreement[indices][:, None]], axis=1)
        share = jnp.asarray(step + 1, jnp.float32) / (total_steps + 1)
        time = jnp.stack([share, share**2, jnp.asarray(np.log10(total_steps / 1000), jnp.float32)])
        outputs: Any = [jnp.zeros((0, OUTPUTS))]
        if params:
            outputs = self._module(structure).apply({"params": phi["network"]}, [features], [extra], time)
        factors = jnp.exp(BOUND * jnp.tanh(outputs[0] / BOUND))
        size, decay = self.sizes(phi, step, total_steps)
        return Sizes(list(size * factors[:, 0]), list(decay * factors[:, 1]), state)

    def _module(self, structure: GradientStructure) -> Any:
        return self.network.module(structure, (), *self._channels, OF_TIME, OUTPUTS)

    def _tensor_reader(self, structure: GradientStructure) -> TensorReader:
        assert self.reader is not None
        return TensorReader(self.reader.structure_read(structure), self.reader.network, 1 + len(self.reader.decays))

    @property
    def _channels(self) -> tuple[int, int]:
        """The numbers of channels: of a tensor, and from GradMetaNet."""
        return (OF_TENSOR, 0) if self.reader is None else (OF_TENSOR + OF_SET, self.reader.network.width)


def of_tensors(gradient: Gradient, params: Sequence[Float[Array, "..."]]) -> Float[Array, "n 7"]:
    """What is known of each tensor without the set: numbers of about unit size."""
    rows = []
    sites = gradient.structure.sites
    for parameter, theta, g in zip(gradient.parameters, params, jax.tree.leaves(gradient.grads), strict=True):
        fan_out = parameter.shape[-1] if parameter.shape else 1
        fan_in = parameter.size // max(fan_out, 1) if len(parameter.shape) > 1 else 1
        square, slope, steep = jnp.mean(theta**2), jnp.mean(theta * g), jnp.mean(g**2)
        grown = 0.5 * jnp.log(fan_in * square + 1e-6)
        cosine = slope * jax.lax.rsqrt(jnp.maximum(square, TINY)) * jax.lax.rsqrt(jnp.maximum(steep, TINY))
        kinds = {sites[ref.site].kind for ref in parameter.sites}
        known = (len(parameter.shape) > 1, np.log(fan_in) / 5, np.log(fan_out) / 5, "input" in kinds, "output" in kinds)
        learned = jnp.tanh(grown / 3), jnp.tanh(cosine * np.sqrt(parameter.size) / 10)
        rows.append(jnp.concatenate([jnp.stack(learned), jnp.asarray(known, jnp.float32)]))
    return jnp.stack(rows) if rows else jnp.zeros((0, OF_TENSOR))


def advance_agreement(
    average: Float[Array, " n"], structure: GradientStructure, factors: Factors, step: Int[Array, ""]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Advance the moving average by the factors of a step.

    Returns:
        The new average, and the same corrected for its start and bounded.
    """
    now = agreements(structure, factors)
    # What is not finite, once, would stay in the average.
    now = jnp.where(jnp.isfinite(now), jnp.clip(now, LEAST, MOST), 0.0)
    average = average + (1 - AGREEMENT_DECAY) * (now - average)
    return average, average / (1 - AGREEMENT_DECAY ** (step + 1.0))


def agreements(structure: GradientStructure, factors: Factors) -> Float[Array, " n"]:
    """Of each parameter ``log(S |E_S g|^2 / E_S |g|^2)`` of the tangents at its outputs; zero without such.

    Example:
        >>> structure = gmn_lopt.analyze(lambda w, x: jnp.mean(x @ w), jnp.ones((2, 1)), jnp.ones((8, 2)))
        >>> agreement = agreements(structure, Factors((jnp.ones((8, 2)),), (jnp.ones((8, 1)),)))
        >>> bool(jnp.allclose(agreement, jnp.log(8)))
        True
    """
    places = written_at(structure)
    read = sorted({place for place in places if place is not None})
    if not read:
        return jnp.zeros(len(places))
    tangents = [factors.tangents[i][None] for i in read]
    means = [g.mean(1, keepdims=True) for g in tangents]
    squares = inner_products([*tangents, *means], [*tangents, *means])[:, 0, 0]
    sizes = jnp.asarray([g.shape[1] for g in tangents], jnp.float32)
    mean, of_means = squares[: len(read)] / sizes, squares[len(read) :]
    found = jnp.log((sizes * of_means + TINY) / (mean + TINY))
    return jnp.stack([jnp.zeros(()) if place is None else found[read.index(place)] for place in places])


def written_at(structure: GradientStructure) -> list[int | None]:
    """For each parameter the index of the tangents at its outputs; None where there are none."""
    tangents = [[structure.sites[ref.site].tangent for ref in p.sites] for p in structure.parameters]
    return [next((t for t in reversed(own) if t is not None), None) for own in tangents]
