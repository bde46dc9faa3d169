"""Factors for flax's ``TrainState``, whose ``apply_gradients`` hands the optimizer gradients and nothing else."""

from functools import partial
from typing import Any, TypeVar

import optax
from jaxtyping import PyTree

from gmn_lopt.factors.structure import Factors

State = TypeVar("State")


def apply_gradients(state: State, *, grads: PyTree, factors: Factors, **kwargs: Any) -> State:
    """``state.apply_gradients(grads=grads, **kwargs)``, with ``factors`` for the optimizer.

    Args:
        state: a :class:`flax.training.train_state.TrainState`, or of a class derived from it.
        grads: the gradients.
        factors: from :func:`gmn_lopt.value_grad_and_factors`; handed on by optax, and not used by optimizers that do
            not know them.
        **kwargs: other fields of the state, to be replaced, such as ``batch_stats``.

    Returns:
        The state after the step.

    Example:
        >>> from flax.training.train_state import TrainState
        >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
        >>> tx = gmn_lopt.load("default", gmn_lopt.analyze(loss, params, x))
        >>> state = TrainState.create(apply_fn=None, params=params, tx=tx)
        >>> value, grads, factors = gmn_lopt.value_grad_and_factors(loss)(state.params, x)
        >>> state = gmn_lopt.apply_gradients(state, grads=grads, factors=factors)
        >>> int(state.step), state.tx is tx
        (1, True)
    """
    of_state: Any = state
    tx = of_state.tx
    update = partial(optax.with_extra_args_support(tx).update, factors=factors)
    stepped = of_state.replace(tx=optax.GradientTransformation(tx.init, update))
    result: State = stepped.apply_gradients(grads=grads, **kwargs).replace(tx=tx)
    return result
