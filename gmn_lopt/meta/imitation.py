"""Imitation of an expert: an auxiliary meta-objective that guides a learned optimizer early in meta-training."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.factors.value_and_grad import value_grad_and_extra
from gmn_lopt.meta.training_problem import TrainingProblem, TrainingState
from gmn_lopt.optimizers.direction import parse_direction
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer

LARGEST = 10.0  # a distance that is larger counts as this much
TINY = 1e-30


class ImitationState(NamedTuple):
    """State of one inner problem.

    Attributes:
        training: the model's parameters, which the learned optimizer moves, and that optimizer's state.
        expert: the expert's state, after the gradients that the learned optimizer has met.
    """

    training: TrainingState
    expert: PyTree


@dataclass(frozen=True)
class ImitationProblem:
    """A training problem whose loss has the distance of the learned update from an expert's added to it.

    The learned optimizer does the training; the expert, which sees the same gradients, says at each step what it would
    have done there (as in DAgger, Ross et al. 2011, arXiv:1011.0686). The distance is ``|u - e| / |e|``, averaged over
    the parameter tensors.

    Attributes:
        problem: the training problem; its ``lopt`` is a :class:`LearnedOptimizer`.
        expert: a base direction, such as ``"denoised:0.06:30:0.9"`` (``parse_direction``).
        weight: what the distance is multiplied by.

    Raises:
        ValueError: the expert is no direction, the weight is not positive, or the learned optimizer is none of this
            package's.
    """

    problem: TrainingProblem
    expert: str
    weight: float | int

    def __post_init__(self) -> None:
        if not isinstance(self.problem.lopt, LearnedOptimizer):
            raise ValueError("imitation needs a training problem of a LearnedOptimizer")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"the weight of imitation is {self.weight}; it must be positive")
        parse_direction(self.expert, self._structure)

    @property
    def horizon(self) -> int:
        """Number of inner training steps ``T``."""
        return self.problem.horizon

    @property
    def loss_cap(self) -> float:
        """Largest loss that counts, with the distance."""
        return self.problem.loss_cap + self.weight * LARGEST

    def splits(self) -> dict[str, PyTree]:
        """The splits of the task's data that this problem reads."""
        return self.problem.splits()

    def init(self, phi: PyTree, data: Any, key: jax.Array) -> ImitationState:
        """Draw parameters; start both optimizers."""
        training = self.problem.init(phi, data, key)
        expert, coefficients = parse_direction(self.expert, self._structure)
        return ImitationState(training, expert.optimizer(coefficients).init(training.params))

    def step(
        self, phi: PyTree, state: ImitationState, data: Any, key: jax.Array
    ) -> tuple[ImitationState, Float[Array, ""]]:
        """Train on one batch; return the training problem's loss, capped, and the weighted distance."""
        lopt, task = self.problem.lopt, self.problem.task
        expert, coefficients = parse_direction(self.expert, self._structure)
        train_key, valid_key = jax.random.split(key)
        batch = task.sample(train_key, data["train"])
        (params, optimizer), needs = state.training, lopt.needs_factors or expert.needs_factors
        loss, grads, extra = value_grad_and_extra(task.loss, needs)(params, batch)
        loss = self.problem.reported(loss, params, data, valid_key)
        updates, optimizer = lopt.optimizer(phi).update(grads, optimizer, params, **extra)
        # What the expert says is a constant: windows are not differentiated through its state.
        asked = jax.lax.stop_gradient((grads, state.expert, params, extra))
        wanted, expert_state = expert.optimizer(coefficients).update(*asked[:3], **asked[3])
        guided = jnp.minimum(loss, self.problem.loss_cap) + self.weight * relative_distance(updates, wanted)
        training = TrainingState(optax.apply_updates(params, updates), optimizer)
        return ImitationState(training, expert_state), guided

    @property
    def _structure(self) -> GradientStructure:
        assert isinstance(self.problem.lopt, LearnedOptimizer)
        return self.problem.lopt.structure


def relative_distance(updates: PyTree, wanted: PyTree) -> Float[Array, ""]:
    """``|u - e| / |e|`` averaged over the leaves; at most 10.

    Args:
        updates: ``u``.
        wanted: ``e``, of the same shapes.
    """
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(wanted), strict=True)
    squares = [(jnp.sum((u - e) ** 2), jnp.sum(e**2)) for u, e in pairs]
    return jnp.minimum(LARGEST, jnp.stack([jnp.sqrt((d + TINY) / (e + TINY)) for d, e in squares]).mean())
