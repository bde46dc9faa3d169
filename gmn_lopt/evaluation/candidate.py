"""A candidate: an optimizer under evaluation, as the protocol runs and times it."""

from collections.abc import Callable
from dataclasses import dataclass

import optax
from jaxtyping import Array, Float, PyTree

from gmn_lopt.factors.value_and_grad import value_grad_and_extra


@dataclass(frozen=True)
class Candidate:
    """An optax transformation under evaluation and what the evaluation has to know about it.

    Attributes:
        name: its label in the report, unique there.
        source: where it came from, as the user wrote it.
        fingerprint: a digest of everything that determines the optimizer; results are recomputed when it changes.
        make: ``make(hyper)``, the optax transformation. Candidates that share ``make`` share compiled programs.
        hyper: the arrays that ``make`` takes: a learning rate, the meta-parameters of a learned optimizer, or nothing.
        needs_factors: whether ``update`` wants ``factors=``.
        digest: of a learned optimizer, the digest of its meta-parameters alone; else empty.
    """

    name: str
    source: str
    fingerprint: str
    make: Callable[[PyTree], optax.GradientTransformation]
    hyper: PyTree = ()
    needs_factors: bool = False
    digest: str = ""


def train_step(
    loss: Callable[[PyTree, PyTree], Float[Array, ""]],
    tx: optax.GradientTransformation,
    needs_factors: bool,
    params: PyTree,
    state: PyTree,
    batch: PyTree,
) -> tuple[PyTree, PyTree, Float[Array, ""]]:
    """Take one training step: value, gradients (and factors), update.

    Args:
        loss: ``loss(params, batch)``, a scalar.
        tx: the optimizer. Those that take them get ``value``, ``grad`` and ``value_fn`` too (``optax.polyak_sgd``,
            ``optax.lbfgs``).
        needs_factors: whether to compute the factors of the gradient and hand them to ``tx``.
        params: the parameters.
        state: the optimizer's state.
        batch: the batch.

    Returns:
        The new parameters, the new state, and the loss before the step.
    """
    value, grads, extra = value_grad_and_extra(loss, needs_factors)(params, batch)
    extra |= {"value": value, "grad": grads, "value_fn": lambda p: loss(p, batch)}
    updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state, value
