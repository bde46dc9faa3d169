"""An estimator over several inner problems with the same meta-parameters, such as tasks of different shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jaxtyping import PyTree

from gmn_lopt.meta.estimator import Estimate, Estimator
from gmn_lopt.meta.problem import InnerProblem


class Part(InnerProblem, Protocol):
    """An inner problem that brings its data."""

    def splits(self) -> Any:
        """The data to hand to it."""
        ...


@dataclass(frozen=True)
class MixtureProblem:
    """Several inner problems with the same meta-parameters, that a :class:`Mixture` of estimators draws from.

    Attributes:
        problems: the inner problems.
        weights: see :class:`Mixture`.
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
class Mixture:
    """Estimates the meta-gradient of one of several inner problems at a time, drawn evenly at random.

    Its ``data`` is a sequence, one entry for each problem.

    Attributes:
        estimators: one for each problem, with equal ``parallel`` and ``inner_steps``.
        weights: for each problem, what its gradient and its losses are multiplied by; the inverse of a typical loss
            makes the problems count alike.

    Raises:
        ValueError: no estimators, or such as do not fit together.
    """

    estimators: tuple[Estimator, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        shapes = {(e.parallel, e.inner_steps) for e in self.estimators}
        if len(shapes) != 1 or len(self.weights) != len(self.estimators):
            raise ValueError("a mixture needs estimators of equally many unrolls and steps, and a weight for each")

    @property
    def parallel(self) -> int:
        """Size of the leading axis of every leaf of the state."""
        return self.estimators[0].parallel

    @property
    def inner_steps(self) -> int:
        """Number of inner steps that one estimate takes, over all unrolls."""
        return self.estimators[0].inner_steps

    def init(self, phi: PyTree, data: Sequence[Any], key: jax.Array) -> tuple[PyTree, ...]:
        """Draw the states of all problems."""
        keys = jax.random.split(key, len(self.estimators))
        return tuple(e.init(phi, d, k) for e, d, k in zip(self.estimators, data, keys))

    def estimate(
        self, phi: PyTree, state: tuple[PyTree, ...], data: Sequence[Any], key: jax.Array
    ) -> tuple[tuple[PyTree, ...], Estimate]:
        """Unroll one window of every unroll of one problem; losses are relative to the problem's weight."""
        choice_key, key = jax.random.split(key)

        def branch(i: int) -> Any:
            def estimate(phi: PyTree, state: tuple[PyTree, ...], data: Sequence[Any], key: jax.Array) -> Any:
                new, e = self.estimators[i].estimate(phi, state[i], data[i], key)
                w = self.weights[i]
                gradient = jax.tree.map(lambda leaf: w * leaf, e.gradient)
                scaled = e._replace(
                    gradient=gradient, loss=w * e.loss, noise=w * e.noise, window_loss=w * e.window_loss
                )
                return (*state[:i], new, *state[i + 1 :]), scaled

            return estimate

        choice = jax.random.randint(choice_key, (), 0, len(self.estimators))
        branches = [branch(i) for i in range(len(self.estimators))]
        result: tuple[tuple[PyTree, ...], Estimate] = jax.lax.switch(choice, branches, phi, state, data, key)
        return result
