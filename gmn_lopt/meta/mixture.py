"""Meta-steps over several inner problems with the same meta-parameters, such as tasks of different shapes."""

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, PyTree

from gmn_lopt.meta.meta_step import MetaState, MetaStep
from gmn_lopt.meta.training_problem import TrainingProblem


@dataclass(frozen=True)
class MixtureProblem:
    """Several inner problems with the same meta-parameters.

    Attributes:
        problems: the inner problems.
        weights: for each, what its gradient and its losses are multiplied by; the inverse of a typical loss makes the
            problems count alike.
    """

    problems: tuple[TrainingProblem, ...]
    weights: tuple[float, ...]

    @property
    def horizon(self) -> int:
        """Number of steps of the longest problem."""
        return max(problem.horizon for problem in self.problems)

    def splits(self) -> tuple[Any, ...]:
        """The data of all problems."""
        return tuple(problem.splits() for problem in self.problems)


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
