"""What is to be learned: the networks of one training set, standardised, and the losses of methods on them."""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

import gmn_lopt
from experiments.curvature.data import DataConfig, Networks, factors_of, structure_of
from experiments.curvature.models import Inputs, standard

CHUNK = 50  # networks that are evaluated at a time


class Problem:
    """A training set, and what is fitted to it.

    Attributes:
        structure: of the networks.
        train: the networks to train on.
        statistics: means and deviations of them: ``input``, of what :meth:`seen` gives, and ``target``.
    """

    def __init__(self, config: DataConfig, train: Networks) -> None:
        self.width, self.train = config.width, train
        self.structure, self.single = structure_of(config), structure_of(replace(config, points=1))
        self.statistics = jax.jit(self._fit)(train)

    def seen(self, weights: Float[Array, "P"], points: Float[Array, "S"]) -> tuple[Any, ...]:
        """Of one network the factors, the gradients of all elements, and their means, for each leaf."""
        factors = factors_of(weights, points, self.width)
        each = jax.tree.map(lambda x: x[:, None], factors)  # sets of one element
        gradients: list[Array] = jax.vmap(lambda f: jax.tree.leaves(self.single.reconstruct(f)))(each)
        return factors, gradients, [g.mean(0) for g in gradients]

    def _fit(self, train: Networks) -> dict[str, Any]:
        def moments(network: tuple[Array, Array]) -> tuple[Any, Any]:
            seen = self.seen(*network)
            return jax.tree.map(jnp.mean, seen), jax.tree.map(lambda x: jnp.mean(x**2), seen)

        first, second = jax.lax.map(moments, (train.weights, train.inputs), batch_size=CHUNK)
        means = jax.tree.map(jnp.mean, first)

        def deviation(square: Array, mean: Array) -> Array:
            variance = square.mean() - mean**2
            return jnp.where(variance > 1e-6 * square.mean(), jnp.sqrt(jnp.maximum(variance, 0.0)), 1.0)

        return {
            "input": {"mean": means, "deviation": jax.tree.map(deviation, second, means)},
            "target": gmn_lopt.fit_standardization(train.targets),
        }

    def inputs(self, weights: Float[Array, "P"], points: Float[Array, "S"]) -> Inputs:
        """What the methods see of one network."""
        seen = self.seen(weights, points)
        of, target = self.statistics["input"], self.statistics["target"]
        read, each, mean = jax.tree.map(lambda x, m, d: (x - m) / d, seen, of["mean"], of["deviation"])
        squared = jax.tree.map(jnp.square, seen[0])

        def squares(w: Float[Array, "S"]) -> Float[Array, "P"]:
            weighted = gmn_lopt.Factors(squared.activations, tuple(g * w[:, None] for g in squared.tangents))
            found = jnp.concatenate([x.ravel() for x in jax.tree.leaves(self.structure.reconstruct(weighted))])
            return (found - target["mean"]) / target["deviation"]

        return Inputs(read, each, [m[None] for m in mean], squares)

    def loss(self, module: nn.Module | None, weights: PyTree, networks: Networks) -> Float[Array, "n"]:
        """The squared error on each network, in units of the target; without a module the standard estimator's."""

        def one(network: Networks) -> Array:
            inputs = self.inputs(network.weights, network.inputs)
            found: Any = standard(inputs) if module is None else module.apply({"params": weights}, inputs)
            target = (network.targets - self.statistics["target"]["mean"]) / self.statistics["target"]["deviation"]
            return jnp.mean((found - target) ** 2)

        return jax.vmap(one)(networks)

    def mean_loss(self, module: nn.Module | None, weights: PyTree, networks: Networks) -> Float[Array, ""]:
        """The mean over many networks."""
        one = lambda network: self.loss(module, weights, jax.tree.map(lambda x: x[None], network))[0]  # noqa: E731
        losses: Array = jax.lax.map(one, networks, batch_size=CHUNK)
        return losses.mean()

    def predictor_weights(self, network: PyTree) -> dict[str, Any]:
        """The weights of a :class:`gmn_lopt.FisherPredictor` with this network."""
        statistics = {}
        for name, of in self.statistics["input"].items():
            factors: gmn_lopt.Factors = of[0]
            statistics[name] = (factors.activations, factors.tangents)
        return {"network": network, "input": statistics, "target": self.statistics["target"]}


def drawn(splits: dict[str, Networks], size: int, seed: int) -> Networks:
    """The networks of a training set of this size, chosen at random."""
    order = jax.random.permutation(jax.random.key(1000 + seed), len(splits["train"].weights))[:size]
    return Networks(*(x[order] for x in splits["train"]))
