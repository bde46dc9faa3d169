"""A moving average of the meta-parameters, kept in the meta-optimizer's state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree


class AverageState(NamedTuple):
    """State of :func:`average_of_parameters`.

    Attributes:
        updates: number of updates averaged over.
        average: shaped like the parameters; the parameters themselves before the first update.
    """

    updates: Int[Array, ""]
    average: PyTree


def average_of_parameters(decay: float) -> optax.GradientTransformation:
    """Keep an exponential moving average of the parameters; updates pass through as they are.

    It must come last in a chain, where the updates are those that will be applied. The average is free of bias towards
    the initial parameters: those of ``s`` updates ago weigh ``decay^s``, normalised to one.

    Args:
        decay: in [0, 1).
    """

    def init(params: PyTree) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params))

    def update(updates: PyTree, state: AverageState, params: PyTree | None = None) -> tuple[PyTree, AverageState]:
        if params is None:
            raise ValueError("the average needs the parameters: pass params to update")
        count = optax.safe_increment(state.updates)
        weight = (1 - decay) / (1 - jnp.float32(decay) ** count)
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, x: (a + weight * (x - a)).astype(x.dtype), state.average, new)
        return updates, AverageState(count, average)

    return optax.GradientTransformation(init, update)


def averaged(optimizer: PyTree, params: PyTree) -> PyTree:
    """The average that an optimizer's state holds, or ``params`` where it holds none."""

    def is_average(node: Any) -> bool:
        return isinstance(node, AverageState)

    found = [node for node in jax.tree.leaves(optimizer, is_leaf=is_average) if is_average(node)]
    return found[-1].average if found else params
