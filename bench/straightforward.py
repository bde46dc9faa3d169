"""The paper's learned optimizer as it is first written down: what bench/meta_step.py compares the library with.

The same meta-parameters, states and updates (to float error) as :class:`gmn_lopt.LearnedOptimizer`, but nothing is
folded, hoisted or shared: dense features ``[*shape, 33]`` with the time features repeated for every entry, encodings
concatenated to the features ``[S, N, 14]`` of all neurons, the product layer on ``[d_in, d_out, 2 f]``, one perceptron
call for each leaf. (The library's first version was none of that, so there is no commit to compare with.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from gmn_lopt.factors.structure import Factors
from gmn_lopt.networks.encoding import encode_sites
from gmn_lopt.networks.gradmetanet import GradMetaNetConfig
from gmn_lopt.networks.pointwise import PointwiseMLP
from gmn_lopt.optimizers.features.paper import DECAYS, EPSILON, PaperFeatures
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer, LearnedOptimizerState
from gmn_lopt.optimizers.leaves import Gradient
from gmn_lopt.optimizers.residual import ResidualState
from gmn_lopt.optimizers.rules import Additive
from gmn_lopt.optimizers.step_size import Constant


@dataclass(frozen=True)
class Straightforward:
    """A learned optimizer with the paper's rule on the ``ds`` network, for multi-layer perceptrons.

    Attributes:
        lopt: the optimizer whose updates it makes.

    Raises:
        ValueError: for another rule, step size, network or features, or a model with copies of neurons.
    """

    lopt: LearnedOptimizer

    def __post_init__(self) -> None:
        residual, sites = self.lopt.residual, self.lopt.structure.sites
        rule = self.lopt.rule == Additive() and self.lopt.step_size == Constant(self.lopt.step_size.initial)
        if not rule or residual is None or not isinstance(residual.network, PointwiseMLP):
            raise ValueError("only for the additive rule without bound, a constant step size, and a PointwiseMLP")
        reader = residual.gradmetanet
        plain = reader is None or (isinstance(reader.network, GradMetaNetConfig) and reader.decays == DECAYS)
        if residual.features != PaperFeatures() or not plain:
            raise ValueError("only for the paper's features and decays, and for GradMetaNet")
        if len({s.set_axes for s in sites}) > 1 or len({s.spaces for s in sites}) < len(sites):
            raise ValueError("only for models whose sites share one set and hold every neuron once")

    @property
    def needs_factors(self) -> bool:
        """Whether ``update`` has to be given ``factors``."""
        return self.lopt.needs_factors

    def optimizer(self, phi: PyTree) -> optax.GradientTransformationExtraArgs:
        """The optax transformation that these meta-parameters define."""
        return optax.GradientTransformationExtraArgs(self.lopt.optimizer(phi).init, partial(self._update, phi))

    def _update(
        self, phi: PyTree, grads: PyTree, state: LearnedOptimizerState, params: PyTree, factors: Any = None, **_: Any
    ) -> tuple[PyTree, LearnedOptimizerState]:
        lopt, structure, weights = self.lopt, self.lopt.structure, phi["residual"]
        assert lopt.residual is not None
        if factors is not None:
            factors = Factors(factors.activations, tuple(len(g) * g for g in factors.tangents))
        gradient = Gradient(structure, list(range(len(structure.parameters))), grads, factors)
        direction, direction_state = lopt.direction.update(phi["direction"], gradient, state.direction)
        averages = jax.tree.map(_advance, state.residual.gradients, grads)
        factor_averages = state.residual.factors
        extra: Sequence[Array | None] = [None] * len(structure.parameters)
        if lopt.residual.gradmetanet is not None:
            channels, factor_averages = lopt.residual.gradmetanet.advance(factor_averages, factors, state.step)
            extra = self._gradmetanet(weights["gradmetanet"], channels)
        steps = []
        leaves = (jax.tree.leaves(tree) for tree in (params, grads, averages, direction))
        for value, grad, average, v, more in zip(*leaves, extra):
            own = jnp.stack([value, grad, *average], axis=-1)
            own = _normalized(jnp.clip(own, -1.0, 1.0), tuple(range(value.ndim)))
            time = jnp.broadcast_to(PaperFeatures().of_time(state.step), (*value.shape, 11))
            x = jnp.concatenate([own, time] if more is None else [own, more, time], axis=-1)
            for i in range(len(weights["network"]) // 2):
                x = jax.nn.relu(x) if i else x
                x = x @ weights["network"][f"kernel_{i}"] + weights["network"][f"bias_{i}"]
            steps.append(-jnp.exp(phi["step_size"]["log_alpha"]) * (v + jnp.exp(weights["log_beta"]) * x[..., 0]))
        residual = ResidualState(averages, factor_averages)
        new = LearnedOptimizerState(state.step + 1, direction_state, residual, state.step_size)
        return jax.tree.unflatten(structure.treedef, steps), new

    def _gradmetanet(self, phi: PyTree, channels: Factors) -> list[Array]:
        """GradMetaNet's features of the entries of each leaf, from factors ``[7, S, d]``."""
        structure, trunk, product = self.lopt.structure, phi["trunk"], phi["product"]
        sites = []
        for site, encoding in zip(structure.sites, encode_sites(structure)):
            a = None if site.activation is None else channels.activations[site.activation]
            g = None if site.tangent is None else channels.tangents[site.tangent]
            slots: list[Any] = [g if a is None else a, a if g is None else g]
            x = _normalized(jnp.moveaxis(jnp.concatenate(slots), 0, -1), (0, 1))
            sites.append(jnp.concatenate([x, jnp.broadcast_to(encoding, (len(x), *encoding.shape))], axis=-1))
        x, i = jnp.concatenate(sites, axis=1), 0
        while f"set_layers_{i}" in trunk:
            w = dict(trunk[f"set_layers_{i}"])
            if i == 0:
                # An encoding is the same for all of the set: means over the set of it would repeat the other two terms.
                none = jnp.zeros_like(w["encoding"])
                for name, rows in (("own", w["encoding"]), ("neuron_mean", w["encoding_mean"])):
                    w[name] = jnp.concatenate([w[name], rows])
                for name in ("set_mean", "full_mean"):
                    w[name] = jnp.concatenate([w[name], none])
            y = x @ w["own"] + x.mean(0) @ w["set_mean"] + x.mean(1, keepdims=True) @ w["neuron_mean"]
            x, i = jax.nn.relu(y + x.mean((0, 1)) @ w["full_mean"] + w["bias"]), i + 1
        h, i = jax.nn.relu(x.mean(0) @ trunk["pool"] + x.mean((0, 1)) @ trunk["pool_full_mean"] + trunk["pool_bias"]), 0
        while f"neuron_{i}_own" in trunk:
            own, mean, bias = (trunk[f"neuron_{i}_{name}"] for name in ("own", "mean", "bias"))
            h, i = jax.nn.relu(h @ own + h.mean(0) @ mean + bias), i + 1
        sizes = [s.size for s in structure.sites]
        neurons = jnp.split(h, [sum(sizes[:i]) for i in range(1, len(sizes))])
        outputs = []
        for parameter in structure.parameters:
            own = [neurons[ref.site] for ref in parameter.sites]
            if len(own) == 1:
                x, first = own[0], product["axes1_write"]
            else:
                pair = jnp.broadcast_arrays(own[0][:, None], own[1][None])
                x, first = jnp.concatenate(pair, -1), jnp.concatenate([product["axes2_read"], product["axes2_write"]])
            bias, out, out_bias = (product[f"axes{len(own)}_{name}"] for name in ("bias", "out", "out_bias"))
            outputs.append(jax.nn.relu(x @ first + bias) @ out + out_bias)
        return outputs


def _advance(averages: Float[Array, "6 *shape"], value: Float[Array, "*shape"]) -> Float[Array, "6 *shape"]:
    return jnp.stack([decay * average + (1.0 - decay) * value for average, decay in zip(averages, DECAYS)])


def _normalized(x: Array, axes: tuple[int, ...]) -> Array:
    return x / jnp.sqrt((x**2).mean(axes) + EPSILON)
