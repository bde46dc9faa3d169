"""Meta-steps over several inner problems with the same meta-parameters, such as tasks of different shapes."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jaxtyping import Array, PyTree

from gmn_lopt.meta.estimator import Estimate, Estimator
from gmn_lopt.meta.meta_step import MetaState, MetaStep
from gmn_lopt.meta.problem import InnerProblem


class Part(InnerProblem, Protocol):
    """An inner problem that brings its data."""

    def splits(self) -> Any:
        """The data to hand to it."""
        ...


@dataclass(frozen=True)
class MixtureProblem:
    """Several inner problems with the same meta-parameters.

    Attributes:
        problems: the inner problems.
        weights: for each, what its gradient and its losses are multiplied by (:class:`Weighted`); the inverse of a
            typical loss makes the problems count alike.
    """

    problems: tuple[Part, ...]
    weights: tuple[float, ...]

    @property
    def horizon(self) -> int:
        """Number of steps of the longest problem."""
        return max(problem.horizon for problem in self.problems)

    def splits(self) -> tuple[Any, ...]:
        """The data of all problems."""
        return tuple(problem.splits() for problem in self.problems)


@dataclass(frozen=True)
class Weighted:
    """An estimator of which gradient and losses are multiplied by a number.

    Attributes:
        estimator: the estimator.
        weight: the number.
    """

    estimator: Estimator
    weight: float

    @property
    def parallel(self) -> int:
        """The estimator's."""
        return self.estimator.parallel

    @property
    def inner_steps(self) -> int:
        """The estimator's."""
        return self.estimator.inner_steps

    def init(self, phi: PyTree, data: Any, key: jax.Array) -> PyTree:
        """Draw the estimator's state."""
        return self.estimator.init(phi, data, key)

    def estimate(self, phi: PyTree, state: PyTree, data: Any, key: jax.Array) -> tuple[PyTree, Estimate]:
        """The estimator's estimate, multiplied."""
        state, e = self.estimator.estimate(phi, state, data, key)
        w = self.weight
        gradient = jax.tree.map(lambda leaf: w * leaf, e.gradient)
        return state, e._replace(
            gradient=gradient, loss=w * e.loss, noise=w * e.noise, truncation_loss=w * e.truncation_loss
        )


@dataclass(frozen=True)
class MixedMetaStep:
    """Meta-steps on several problems in turn, used like a :class:`MetaStep`.

    Each problem has a compiled program of its own (one program with a branch for each would take as long to compile as
    all of them, before the first meta-step) and its own estimator's state; meta-parameters and the meta-optimizer's
    state are common. Data and the estimators' states are tuples, one entry for each problem.

    Attributes:
        steps: one for each problem, with the same meta-optimizer.
    """

    steps: tuple[MetaStep, ...]

    @property
    def parallel(self) -> int:
        """Number of unrolls (or pairs) of a meta-step."""
        return self.steps[0].parallel

    @property
    def inner_steps(self) -> int:
        """Number of inner steps that one meta-step takes, over all unrolls."""
        return self.steps[0].inner_steps

    @property
    def programs(self) -> int:
        """Number of programs, one compiled in each of the first meta-steps."""
        return len(self.steps)

    def place(self, tree: PyTree) -> PyTree:
        """See :meth:`MetaStep.place`."""
        return self.steps[0].place(tree)

    def init(self, phi: PyTree, data: tuple[Any, ...], key: jax.Array) -> MetaState:
        """The state before the first meta-step."""
        keys = jax.random.split(key, len(self.steps))
        states = [step.init(phi, d, k) for step, d, k in zip(self.steps, data, keys)]
        return states[0]._replace(estimator=tuple(state.estimator for state in states))

    def __call__(
        self, state: MetaState, data: tuple[Any, ...], key: jax.Array, number: int
    ) -> tuple[MetaState, dict[str, Array]]:
        """Take one meta-step, on problem ``number`` modulo their number; see :meth:`MetaStep.__call__`."""
        i = number % len(self.steps)
        states = state.estimator
        new, metrics = self.steps[i](state._replace(estimator=states[i]), data[i], key, number)
        return new._replace(estimator=(*states[:i], new.estimator, *states[i + 1 :])), metrics
