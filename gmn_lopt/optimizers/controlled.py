"""A step size that learns to read the set of gradients: for each tensor a factor of its step and of its weight decay.

Where the number of steps ``T`` is known, tensor ``i`` takes steps of ``alpha s(t / T) exp(f_i)``, and is decayed by
``lambda exp(d_i)``, with the schedule ``s`` of :func:`gmn_lopt.optimizers.horizon.known_horizon`. A perceptron that all
tensors share gives ``(f_i, d_i)``; untrained they are zero, so that learning starts from the schedule. It reads

- of the time: the share of the steps that is taken, its square, and how many there are;
- of the tensor: its size against that of its initialisation, whether the gradient would shrink it, its shape, and
  whether it stands at the model's inputs or outputs;
- of the set, if there is a ``reader``: three statistics of the tangents ``g`` at the tensor's outputs, averaged over
  steps, and what GradMetaNet's trunk makes of the factors (arXiv:2507.01649, section 5, steps 0 to 4), the mean over
  its neurons.

The statistics are what no averaged gradient shows:

- how far examples agree, ``log(S |E_S g|^2 / E_S |g|^2)``: zero where their gradients are independent noise, ``log S``
  where they are all equal, and negative where they cancel;
- how much is left to learn, ``log E_S |g|^2`` against its value at the first step: a classifier that knows all its
  examples by heart has no tangents left;
- how few examples it comes from, ``log(E_S |g|^4 / (E_S |g|^2)^2)``.

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

BOUND = 1.5  # of the logarithms of both factors
OF_TENSOR, OF_SET, OF_TIME, OUTPUTS = 7, 3, 3, 2
STATISTICS_DECAY = 0.95
LEAST, MOST = np.array([-1.0, -20.0, 0.0], np.float32), np.array([3.0, 20.0, 5.0], np.float32)  # of the statistics
SCALES = np.array([1.0, 0.25, 1.0], np.float32)  # that what the network reads is of about unit size
TINY = 1e-30


class ControllerState(NamedTuple):
    """What is remembered of the sets.

    Attributes:
        statistics: the moving average of the statistics of each parameter, ``[n, 3]``, not corrected for its start.
        first: ``log E_S |g|^2`` at the first step, ``[n]``.
        factors: GradMetaNet's moving averages (:meth:`SetReader.init`).
    """

    statistics: Float[Array, "n 3"]
    first: Float[Array, " n"]
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
        n = len(structure.parameters)
        return ControllerState(jnp.zeros((n, OF_SET)), jnp.zeros(n), self.reader.init(structure))

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
            seen = jnp.zeros((len(structure.parameters), OF_SET))
            if self.needs_factors(structure):
                assert gradient.factors is not None
                statistics, first, seen = advance_statistics(state, structure, gradient.factors, step)
                channels, averages = self.reader.advance(state.factors, gradient.factors, step)
                read: Any = self._tensor_reader(structure).apply({"params": phi["gradmetanet"]}, channels)
                extra, state = jnp.stack(read)[indices], ControllerState(statistics, first, averages)
            features = jnp.concatenate([features, seen[indices]], axis=1)
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


def advance_statistics(
    state: ControllerState, structure: GradientStructure, factors: Factors, step: Int[Array, ""]
) -> tuple[Float[Array, "n 3"], Float[Array, " n"], Float[Array, "n 3"]]:
    """Advance the moving averages by the factors of a step.

    Returns:
        The new :attr:`ControllerState.statistics` and :attr:`ControllerState.first`, and what the network reads.
    """
    now = statistics(structure, factors)
    first = jnp.where(step == 0, now[:, 1], state.first)
    first = jnp.where(jnp.isfinite(first), first, 0.0)
    now = now.at[:, 1].add(-first)
    # What is not finite, once, would stay in the average.
    now = jnp.where(jnp.isfinite(now), jnp.clip(now, LEAST, MOST), 0.0)
    average = state.statistics + (1 - STATISTICS_DECAY) * (now - state.statistics)
    return average, first, jnp.asarray(SCALES) * average / (1 - STATISTICS_DECAY ** (step + 1.0))


def statistics(structure: GradientStructure, factors: Factors) -> Float[Array, "n 3"]:
    """Of each parameter agreement, size and concentration of the tangents at its outputs; zero without such.

    They are ``log(S |E_S g|^2 / E_S |g|^2)``, ``log E_S |g|^2`` and ``log(E_S |g|^4 / (E_S |g|^2)^2)``.

    Example:
        >>> structure = gmn_lopt.analyze(lambda w, x: jnp.mean(x @ w), jnp.ones((2, 1)), jnp.ones((8, 2)))
        >>> found = statistics(structure, Factors((jnp.ones((8, 2)),), (jnp.ones((8, 1)),)))
        >>> bool(jnp.allclose(found, jnp.array([[jnp.log(8), 0.0, 0.0]]), atol=1e-6))
        True
    """
    places = written_at(structure)
    of_tangents: dict[int, Array] = {}
    for place in {place for place in places if place is not None}:
        g = factors.tangents[place]
        squares = jnp.sum(g**2, axis=1)
        size, agreeing = squares.mean() + TINY, len(g) * jnp.sum(g.mean(0) ** 2) + TINY
        # Of squares at a mean of one: their squares are in the range of float32.
        concentration = jnp.mean((squares / size) ** 2) + TINY
        of_tangents[place] = jnp.log(jnp.stack([agreeing / size, size, concentration]))
    return jnp.stack([jnp.zeros(OF_SET) if place is None else of_tangents[place] for place in places])


def written_at(structure: GradientStructure) -> list[int | None]:
    """For each parameter the index of the tangents at its outputs; None where there are none."""
    tangents = [[structure.sites[ref.site].tangent for ref in p.sites] for p in structure.parameters]
    return [next((t for t in reversed(own) if t is not None), None) for own in tangents]
