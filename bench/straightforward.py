"""The learned optimizer's rule as it is first written down: what bench/meta_step.py compares the library with.

The same meta-parameters, states and updates (to float error) as :class:`gmn_lopt.LearnedOptimizer`, but nothing is
folded, hoisted or shared: dense features ``[*shape, 33]`` with the time features repeated for every entry, encodings
concatenated to the features ``[S, N, 14]`` of all neurons, the product layer on ``[d_in, d_out, 2 f]``, one perceptron
call for each leaf. (The library's first version was none of that, so there is no commit to compare with.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from gmn_lopt import LearnedOptimizer
from gmn_lopt.factors.structure import Factors
from gmn_lopt.networks.encoding import encode_sites
from gmn_lopt.optimizers.base_direction import update_direction
from gmn_lopt.optimizers.features.paper import DECAYS, EPSILON, time_features
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizerState
from gmn_lopt.optimizers.rules import GATE_SCALE
from gmn_lopt.optimizers.set_subset import subset


@dataclass(frozen=True)
class Straightforward:
    """A learned optimizer with the additive rule on the ``ds`` backbone, for multi-layer perceptrons.

    Attributes:
        lopt: the optimizer whose updates it makes.

    Raises:
        ValueError: for another rule or backbone, a bound, a schedule, or a model with copies of neurons.
    """

    lopt: LearnedOptimizer

    def __post_init__(self) -> None:
        lopt, sites = self.lopt, self.lopt.structure.sites
        plain = lopt.backbone == "ds" and lopt.rule == "additive" and lopt.bound is None
        plain = plain and not (lopt.decay or lopt.adapt)
        gmn = lopt.gradmetanet
        if not plain or (gmn is not None and (gmn.use_parameter or gmn.factor_decays != DECAYS)):
            raise ValueError(
                "only for the additive rule on the ds backbone, without bound, decay, adapt, use_parameter and "
                "factor_decays"
            )
        if len({s.set_axes for s in sites}) > 1 or len({s.spaces for s in sites}) < len(sites):
            raise ValueError("only for models whose sites share one set and hold every neuron once")

    @property
    def needs_factors(self) -> bool:
        """Whether ``update`` has to be given ``factors``."""
        return self.lopt.needs_factors

    def optimizer(self, phi: PyTree) -> optax.GradientTransformationExtraArgs:
        """The optax transformation that these meta-parameters define."""

        def update(
            grads: PyTree, state: LearnedOptimizerState, params: PyTree | None = None, *, factors: Any = None, **_: Any
        ) -> tuple[PyTree, LearnedOptimizerState]:
            return self._update(phi, grads, state, params, factors)

        return optax.GradientTransformationExtraArgs(self.lopt.optimizer(phi).init, update)

    def _update(
        self, phi: PyTree, grads: PyTree, state: LearnedOptimizerState, params: PyTree, factors: Any
    ) -> tuple[PyTree, LearnedOptimizerState]:
        lopt, structure = self.lopt, self.lopt.structure
        if factors is not None:
            factors = Factors(factors.activations, tuple(len(g) * g for g in factors.tangents))
        groups = lopt.denoised_groups(range(len(structure.parameters)))
        direction, direction_state = update_direction(
            lopt.base, structure.parameters, phi, grads, state.direction, groups, factors
        )
        averages = jax.tree.map(_advance, state.gradient_averages, grads)
        factor_averages = state.factor_averages
        extra: Sequence[Array | None] = [None] * len(structure.parameters)
        if lopt.gradmetanet is not None:
            read = subset(factors, lopt.gradmetanet.max_set_size, state.step)
            current = (read.activations, read.tangents)
            factor_averages = jax.tree.map(_advance, state.factor_averages, current)
            channels = jax.tree.map(lambda x, a: jnp.concatenate([x[None], a]), current, factor_averages)
            extra = self._gradmetanet(phi["gradmetanet"], *channels)
        steps = []
        leaves = (jax.tree.leaves(tree) for tree in (params, grads, averages, direction))
        for value, grad, average, v, more in zip(*leaves, extra):
            own = jnp.stack([value, grad, *average], axis=-1)
            own = _normalized(jnp.clip(own, -1.0, 1.0), tuple(range(value.ndim)))
            time = jnp.broadcast_to(time_features(state.step), (*value.shape, 11))
            x = jnp.concatenate([own, time] if more is None else [own, more, time], axis=-1)
            for i in range(lopt.hidden_layers):
                x = jax.nn.relu(x @ phi["backbone"][f"kernel_{i}"] + phi["backbone"][f"bias_{i}"])
            x = x @ phi["backbone"][f"kernel_{i + 1}"] + phi["backbone"][f"bias_{i + 1}"]
            v = v * jnp.exp(GATE_SCALE * x[..., 1]) if lopt.gate else v
            steps.append(-jnp.exp(phi["log_alpha"]) * (v + jnp.exp(phi["log_beta"]) * x[..., 0]))
        new = LearnedOptimizerState(state.step + 1, direction_state, averages, factor_averages)
        return jax.tree.unflatten(structure.treedef, steps), new

    def _gradmetanet(self, phi: PyTree, activations: PyTree, tangents: PyTree) -> list[Array]:
        """GradMetaNet's features of the entries of each leaf, from factors ``[7, S, d]``."""
        config, structure = self.lopt.gradmetanet, self.lopt.structure
        assert config is not None
        trunk, product = phi["trunk"], phi["product"]
        sites = []
        for site, encoding in zip(structure.sites, encode_sites(structure)):
            a = None if site.activation is None else activations[site.activation]
            g = None if site.tangent is None else tangents[site.tangent]
            slots: list[Any] = [g if a is None else a, a if g is None else g]
            x = _normalized(jnp.moveaxis(jnp.concatenate(slots), 0, -1), (0, 1))
            sites.append(jnp.concatenate([x, jnp.broadcast_to(encoding, (len(x), *encoding.shape))], axis=-1))
        x = jnp.concatenate(sites, axis=1)
        for i in range(config.set_layers):
            w = dict(trunk[f"set_layers_{i}"])
            if i == 0:
                # An encoding is the same for all of the set: means over the set of it would repeat the other two terms.
                none = jnp.zeros_like(w["encoding"])
                for name, rows in (("own", w["encoding"]), ("neuron_mean", w["encoding_mean"])):
                    w[name] = jnp.concatenate([w[name], rows])
                for name in ("set_mean", "full_mean"):
                    w[name] = jnp.concatenate([w[name], none])
            y = x @ w["own"] + x.mean(0) @ w["set_mean"] + x.mean(1, keepdims=True) @ w["neuron_mean"]
            x = jax.nn.relu(y + x.mean((0, 1)) @ w["full_mean"] + w["bias"])
        h = jax.nn.relu(x.mean(0) @ trunk["pool"] + x.mean((0, 1)) @ trunk["pool_full_mean"] + trunk["pool_bias"])
        for i in range(config.neuron_layers):
            own, mean, bias = (trunk[f"neuron_{i}_{name}"] for name in ("own", "mean", "bias"))
            h = jax.nn.relu(h @ own + h.mean(0) @ mean + bias)
        sizes = [s.size for s in structure.sites]
        neurons = jnp.split(h, [sum(sizes[:i]) for i in range(1, len(sizes))])
        outputs = []
        for parameter in structure.parameters:
            own = [neurons[ref.site] for ref in parameter.sites]
            if len(own) == 1:
                x, first = own[0], product["axes1_write"]
            else:
                h_in, h_out = own
                shape = (len(h_in), len(h_out), config.width)
                pair = [jnp.broadcast_to(h_in[:, None], shape), jnp.broadcast_to(h_out[None], shape)]
                x, first = jnp.concatenate(pair, -1), jnp.concatenate([product["axes2_read"], product["axes2_write"]])
            bias, out, out_bias = (product[f"axes{len(own)}_{name}"] for name in ("bias", "out", "out_bias"))
            outputs.append(jax.nn.relu(x @ first + bias) @ out + out_bias)
        return outputs


def _advance(averages: Float[Array, "6 *shape"], value: Float[Array, "*shape"]) -> Float[Array, "6 *shape"]:
    return jnp.stack([decay * average + (1.0 - decay) * value for average, decay in zip(averages, DECAYS)])


def _normalized(x: Array, axes: tuple[int, ...]) -> Array:
    return x / jnp.sqrt((x**2).mean(axes) + EPSILON)
