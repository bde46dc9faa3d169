"""Random step sizes, schedules and reparametrisations of an inner problem, to meta-train a generalist."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from gmn_lopt.factors.value_and_grad import value_grad_and_extra
from gmn_lopt.meta.training_problem import TrainingProblem
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.optimizers.rules import Normalized


class AugmentedState(NamedTuple):
    """State of one augmented inner problem.

    Attributes:
        params: what is trained; the model's parameters are ``scales`` times it.
        optimizer: the optimizer's state.
        scales: a scalar for each leaf.
        factor: what the optimizer's steps are multiplied by.
        decays: whether they are multiplied by a cosine, too, that falls to zero over the horizon.
    """

    params: PyTree
    optimizer: PyTree
    scales: PyTree
    factor: Float[Array, ""]
    decays: Bool[Array, ""]


@dataclass(frozen=True)
class AugmentedProblem(TrainingProblem):
    """A training problem with a learned optimizer of the normalised rule, varied at random for each unroll.

    Every tensor is reparametrised by a scale, log-uniform in ``[1 / scale_range, scale_range]`` (task augmentation;
    Metz et al. 2022, Moudgil et al. 2026), the step size multiplied by another in ``[1 / rate_range, rate_range]``.
    An optimizer whose step size is scheduled goes by its own; that of others is kept or decayed,
    evenly. Gradients are those of what is trained; factors are left as they are, since GradMetaNet divides each by its
    root mean square. The denoised direction does not: with the factors that belong to them, its steps are the same in
    all parametrisations, and with others they are wrong by the scale. So tensors that take it are left alone.

    Attributes, besides those of a :class:`TrainingProblem`:
        scale_range: largest scale of a tensor; 1: none.
        rate_range: largest factor of the step size; 1: none.
    """

    lopt: LearnedOptimizer
    scale_range: float = 3.0
    rate_range: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.lopt.rule, Normalized):
            raise ValueError("augmentation varies the step size: use a learned optimizer with the Normalized rule")
        if not (1 <= self.scale_range < math.inf and 1 <= self.rate_range < math.inf):
            raise ValueError("scale_range and rate_range must be at least 1")

    def init(self, phi: PyTree, data: Any, key: jax.Array) -> PyTree:
        """Draw parameters, scales and step size; start the optimizer."""
        init_key, scale_key, rate_key, decay_key = jax.random.split(key, 4)
        params = self.task.init(init_key)
        leaves, treedef = jax.tree.flatten(params)
        drawn = jnp.exp(_log_uniform(scale_key, (len(leaves),), self.scale_range))
        rescaled = self.lopt.direction.rescaled(self.lopt.structure, range(len(leaves)))
        scales = jax.tree.unflatten(treedef, [jnp.ones(()) if i in rescaled else s for i, s in enumerate(drawn)])
        params = jax.tree.map(lambda p, s: p / s, params, scales)
        optimizer = self.optimizer(phi).init(params)
        factor = jnp.exp(_log_uniform(rate_key, (), self.rate_range))
        decays = jax.random.bernoulli(decay_key) & (not self.lopt.step_size.scheduled)
        return AugmentedState(params, optimizer, scales, factor, decays)

    def step(self, phi: PyTree, state: PyTree, data: Any, key: jax.Array) -> tuple[PyTree, Float[Array, ""]]:
        """Train on one batch; return the loss that the problem's ``meta_loss`` asks for."""
        train_key, valid_key = jax.random.split(key)
        batch = self.task.sample(train_key, data["train"])
        params = optax.tree.mul(state.scales, state.params)
        loss, grads, extra = value_grad_and_extra(self.task.loss, self.lopt.needs_factors)(params, batch)
        cosine = 0.5 * (1 + jnp.cos(math.pi * state.optimizer.step / self.horizon))
        factor = state.factor * jnp.where(state.decays, cosine, 1.0)
        grads = optax.tree.mul(state.scales, grads)
        updates, optimizer = self.optimizer(phi).update(grads, state.optimizer, state.params, **extra)
        updates = optax.tree.scale(factor, updates)
        loss = self.reported(loss, params, data, valid_key)
        return state._replace(params=optax.apply_updates(state.params, updates), optimizer=optimizer), loss


def _log_uniform(key: jax.Array, shape: tuple[int, ...], largest: float) -> Array:
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * math.log(largest)
