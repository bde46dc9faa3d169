"""Their optimizers as optax transformations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, PyTree, UInt32

from gmn_lopt.interop.learned_optimization import interface
from gmn_lopt.interop.learned_optimization.named import make
from gmn_lopt.interop.learned_optimization.weights import read_weights
from gmn_lopt.util.checks import plain_numbers

WEIGHTS = "weights"
UNSETTABLE = (AttributeError, KeyError, NotImplementedError, TypeError, ValueError)


class TheirState(NamedTuple):
    """State of :func:`to_optax`.

    Attributes:
        optimizer: of theirs, without the parameters, which it keeps, too.
        key: source of what it draws.
    """

    optimizer: PyTree
    key: UInt32[Array, "words"]


def load_optimizer(place: str, **settings: Any) -> tuple[Callable[[PyTree], Any], PyTree]:
    """Make an optimizer of what is named.

    Args:
        place: ``learned_optimization:MODULE:NAME``; the name of an ``Optimizer``, a ``LearnedOptimizer``, or of what
            makes one.
        **settings: its own; for a learned one ``weights``, the file with its meta-parameters.

    Returns:
        ``opt_fn`` and ``theta``: ``opt_fn(theta)`` is their ``Optimizer``. ``theta`` is ``()`` of a hand-made one.

    Raises:
        ValueError: in one line, if it is not there, is no optimizer, or the weights are not its own.
    """
    plain_numbers(settings)
    weights = settings.pop(WEIGHTS, None)
    theirs, name = make(place, settings), place.rpartition(":")[2]
    if callable(getattr(theirs, "opt_fn", None)):
        if not isinstance(weights, str):
            raise ValueError(f"{name} is a learned optimizer: name the file of its meta-parameters, {WEIGHTS}='FILE'")
        return theirs.opt_fn, read_weights(weights, theirs.init(interface.raw_key(jax.random.key(0))))
    if not all(callable(getattr(theirs, method, None)) for method in ("init", "update", "get_params")):
        raise ValueError(
            f"{name} makes a {type(theirs).__name__}, neither an Optimizer (init, update, get_params) nor a "
            "LearnedOptimizer (init, opt_fn) of learned_optimization"
        )
    if weights is not None:
        raise ValueError(f"{name} is made by hand: it has no {WEIGHTS}")
    return lambda theta: theirs, ()


def to_optax(theirs: Any, num_steps: int | None = None) -> optax.GradientTransformationExtraArgs:
    """Make an optax transformation of one of their optimizers.

    ``update(grads, state, params, value=loss)`` takes the loss, for those that read it. The parameters are those handed
    in, whatever was done to them in between. What an optimizer draws is drawn from a fixed key.

    Args:
        theirs: their ``Optimizer``: ``init``, ``update``, ``get_params``, and ``set_params`` or a state that replaces
            its ``params``.
        num_steps: the number of steps that there will be, which some of them have to know.

    Returns:
        The transformation; its ``init`` raises a ValueError where no parameters can be set, its ``update`` without
        ``params``.
    """

    def init(params: PyTree) -> TheirState:
        own, key = jax.random.split(interface.raw_key(jax.random.key(0)))
        state = theirs.init(params, num_steps=num_steps, key=own)
        # A second copy of the parameters would have to be kept equal to the first.
        return TheirState(_with_params(theirs, state, ()), key)

    def update(
        updates: PyTree, state: TheirState, params: PyTree | None = None, *, value: Any = None, **_: Any
    ) -> tuple[PyTree, TheirState]:
        if params is None:
            raise ValueError(
                "an optimizer of learned_optimization changes parameters: call update(grads, state, params)"
            )
        own, key = jax.random.split(state.key)
        before = _with_params(theirs, state.optimizer, params)
        after = theirs.update(before, updates, loss=value, model_state=None, key=own)
        new, old = jax.tree.leaves(theirs.get_params(after)), jax.tree.leaves(params)
        steps = [(x - p).astype(p.dtype) for x, p in zip(new, old, strict=True)]
        tree = jax.tree.unflatten(jax.tree.structure(params), steps)
        return tree, TheirState(_with_params(theirs, after, ()), key)

    return optax.GradientTransformationExtraArgs(init, update)


def _with_params(theirs: Any, state: Any, params: PyTree) -> Any:
    """Their state with other parameters: ``set_params`` of version 0.0.1 knows named tuples only."""
    ways = (
        lambda: theirs.set_params(state, params),
        lambda: state.replace(params=params),
        lambda: state._replace(params=params),
    )
    for way in ways:
        try:
            return way()
        except UNSETTABLE:
            continue
    raise ValueError(f"{type(theirs).__name__} has no way to set the parameters in its state")
