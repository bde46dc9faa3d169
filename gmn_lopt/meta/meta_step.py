"""One meta-step: estimate the meta-gradient, update the meta-parameters; compiled, over all devices."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, PyTree

from gmn_lopt.meta.estimator import Estimator
from gmn_lopt.meta.sharding import unroll_shardings


class MetaState(NamedTuple):
    """All that changes from meta-step to meta-step: ``phi``, and the states of the meta-optimizer and estimator."""

    phi: PyTree
    optimizer: PyTree
    estimator: PyTree


@dataclass(frozen=True)
class MetaStep:
    """A compiled meta-step. The unrolls are spread over the devices of all processes (:func:`unroll_shardings`).

    Attributes:
        estimator: of the meta-gradient.
        meta_optimizer: turns the meta-gradient into an update of the meta-parameters.
        weight: what the meta-gradient and the losses are multiplied by.
        programs: number of programs, one compiled in each of the first meta-steps.
    """

    estimator: Estimator
    meta_optimizer: optax.GradientTransformation
    weight: float = 1.0
    programs: ClassVar[int] = 1

    @property
    def inner_steps(self) -> int:
        """Number of inner steps that one meta-step takes, over all unrolls."""
        return self.estimator.inner_steps

    def init(self, phi: PyTree, data: PyTree, key: jax.Array) -> MetaState:
        """The state before the first meta-step."""
        return self._init(*self.place((phi, data, key)))

    def place(self, tree: PyTree) -> PyTree:
        """Copy data or a key, alike in all processes, to all devices, once, for :meth:`__call__`."""
        sharding = self._shardings.phi
        if sharding.is_fully_addressable:
            return jax.device_put(tree, sharding)
        # device_put cannot send typed keys to other processes' devices, and would compare the arrays of all processes.
        return jax.jit(lambda x: x, out_shardings=sharding)(tree)

    def __call__(
        self, state: MetaState, data: PyTree, key: jax.Array, number: int
    ) -> tuple[MetaState, dict[str, Array]]:
        """Take one meta-step.

        Args:
            state: its memory is used again for the new one.
            data: handed to the inner problem.
            key: that of all meta-steps.
            number: of this meta-step; with ``key`` it determines all randomness, so that a run that starts from a saved
                state continues exactly as one that was not interrupted.

        Returns:
            The new state, and the metrics ``loss``, ``gradient_norm``, ``gradient_noise``, ``truncation_loss`` and
            ``truncation_start`` (see :class:`gmn_lopt.meta.estimator.Estimate`).
        """
        return self._step(state, data, key, np.uint32(number))

    def compile(self, state: MetaState, data: PyTree, key: jax.Array) -> jax.stages.Compiled:
        """The compiled meta-step by itself, to measure; call it with the number of the meta-step as a ``uint32``."""
        return self._step.lower(state, data, key, np.uint32(0)).compile()

    @cached_property
    def _shardings(self) -> MetaState:
        split, replicated = unroll_shardings(self.estimator.parallel)
        return MetaState(replicated, replicated, split)

    @cached_property
    def _init(self) -> Any:
        def init(phi: PyTree, data: PyTree, key: jax.Array) -> MetaState:
            return MetaState(phi, self.meta_optimizer.init(phi), self.estimator.init(phi, data, key))

        return jax.jit(init, out_shardings=self._shardings)

    @cached_property
    def _step(self) -> Any:
        def step(state: MetaState, data: PyTree, key: jax.Array, number: Any) -> tuple[MetaState, dict[str, Array]]:
            phi, optimizer, unrolls = state
            unrolls, estimate = self.estimator.estimate(phi, unrolls, data, jax.random.fold_in(key, number))
            gradient = jax.tree.map(lambda leaf: self.weight * leaf, estimate.gradient)
            updates, optimizer = self.meta_optimizer.update(gradient, optimizer, phi)
            new_state = MetaState(optax.apply_updates(phi, updates), optimizer, unrolls)
            metrics = {
                "loss": self.weight * estimate.loss,
                "gradient_norm": optax.tree.norm(gradient),
                "gradient_noise": self.weight * estimate.noise,
                "truncation_loss": self.weight * estimate.truncation_loss,
                "truncation_start": estimate.truncation_start,
            }
            return new_state, metrics

        r = self._shardings.phi
        inputs, outputs = (self._shardings, r, r, r), (self._shardings, r)
        return jax.jit(step, in_shardings=inputs, out_shardings=outputs, donate_argnums=0)
