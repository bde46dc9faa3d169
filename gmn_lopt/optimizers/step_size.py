"""The step size: constant or a power law in time, with or without a feedback that needs neither task nor horizon.

The step size of a tensor is ``alpha (1 + t / tau)^-power exp(c)``: a schedule, and :class:`Feedback`'s ``c``, one for
each tensor, which moves by

    ``c <- c + gain (z + overshoot)``,  ``z = cos(-g, u)``, divided by its root mean square, cut to ``[-1, 1]``

where ``u`` is the update that the tensor was given last, and ``g`` the gradient after it. A gradient that would have
gone on as the step before went says that steps are too small; one that would take it back, that they are too large
(hypergradient descent: Baydin et al. 2018, arXiv:1703.04782). Batches are independent, so noise in ``g`` leaves the
mean of the cosine at zero, and since ``z`` has unit size whatever the noise, one ``gain`` does for all models.

Steps that make the most of the next one have ``z`` at zero. Over a longer time larger ones pay (Wu et al. 2018,
arXiv:1803.02021, on this short-horizon bias), hence ``overshoot``, which is positive. Asking for the opposite would not
be safe: where gradients are mostly noise, ``z`` is about zero however small the steps, and they would shrink for ever.
Nor is growing without an end: once a classifier has separated its examples all gradients agree, for any step, until the
steps are so large that everything is lost. So no step size becomes more than ``alpha``: feedback can undo the power
law, and do more than it, but starts from the largest steps that there will be.

A learning rate that the user gives sets the step size alone, without either. So does the number of steps, where it is
known (:mod:`gmn_lopt.optimizers.horizon`).
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.optimizers.leaves import Gradient
from gmn_lopt.util.checks import positive
from gmn_lopt.util.stacks import inner_products

SQUARE_DECAY, TINY = 0.98, 1e-30


class StepSizeState(NamedTuple):
    """State of the feedback.

    Attributes:
        update: the last update, shaped like the parameters.
        square: for each parameter, in the order of the leaves, the moving average of the squared cosine, not corrected
            for its start.
        log_factor: for each parameter ``c``.
    """

    update: PyTree
    square: Float[Array, " n"]
    log_factor: Float[Array, " n"]


class Sizes(NamedTuple):
    """The sizes of a step.

    Attributes:
        steps: of each tensor.
        decays: the weight decay of each tensor; None: what the user says.
        state: the new state.
    """

    steps: list[Array]
    decays: list[Array] | None
    state: Any


@dataclass(frozen=True)
class Feedback:
    """Adapts the step size of each tensor by whether gradients agree with the steps before them; see above.

    Attributes:
        gain, overshoot: where the coefficients of these names start.

    Raises:
        ValueError: one of them is not positive.

    Example:
        >>> PowerLaw(0.045, tau=50.0, feedback=Feedback(gain=0.05)).feedback
        Feedback(gain=0.05, overshoot=0.02)
    """

    gain: float = 0.02
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        positive(self, "gain", "overshoot")


@dataclass(frozen=True)
class StepSize(abc.ABC):
    """The step size of each tensor, ``alpha`` times a schedule, with or without feedback.

    Attributes:
        initial: where ``alpha`` starts.
        feedback: adapts the step size of each tensor; None: all have the scheduled one.

    Raises:
        ValueError: a coefficient does not start above zero.
    """

    initial: float = 0.1
    feedback: Feedback | None = field(default=None, kw_only=True)

    # Whether it can only be used where the number of steps is known.
    wants_total_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive(self, *(f.name for f in fields(self) if f.type in (float, "float")))

    @property
    def scheduled(self) -> bool:
        """Whether it changes by itself while training."""
        return self.feedback is not None

    def coefficients(self) -> dict[str, float]:
        """``alpha``, the schedule's, and the feedback's."""
        schedule = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("initial", "feedback")}
        feedback = {} if self.feedback is None else asdict(self.feedback)
        return {"alpha": self.initial} | schedule | feedback

    @abc.abstractmethod
    def schedule(self, phi: Mapping[str, Array], step: Int[Array, ""]) -> Float[Array, ""] | float:
        """What ``alpha`` is multiplied by after ``step`` steps; at most one."""

    def needs_factors(self, structure: GradientStructure) -> bool:
        """Whether :meth:`update` reads the factors of this model's gradient."""
        return False

    def init_weights(self, key: jax.Array, structure: GradientStructure) -> dict[str, PyTree]:
        """Draw the weights of networks, beside the coefficients; most step sizes have none."""
        return {}

    def init(self, structure: GradientStructure, zeros: PyTree) -> Any:
        """The state before the first step; ``zeros`` are shaped like the parameters."""
        count = len(jax.tree.leaves(zeros))
        each = (jnp.zeros(count, jnp.float32) for _ in range(2))
        return () if self.feedback is None else StepSizeState(zeros, *each)

    def update(
        self,
        phi: Mapping[str, Any],
        state: Any,
        gradient: Gradient,
        params: Sequence[Float[Array, "..."]],
        step: Int[Array, ""],
        total_steps: int | None,
    ) -> Sizes:
        """The sizes of a step; the ``update`` in the new state of feedback is still that of the step before.

        Args:
            phi: the coefficients, ``log_NAME`` each, and the weights.
            state: the state.
            gradient: the gradient.
            params: the parameters that are handled, float32.
            step: number of steps taken.
            total_steps: the number of steps that there will be, or None where that is not known.
        """
        scheduled = self.schedule(phi, step)
        size = jnp.exp(phi["log_alpha"]) * scheduled
        if not isinstance(state, StepSizeState):
            return Sizes([size] * len(params), None, state)
        state = adapt_step_size(phi, state, gradient.grads, step, scheduled)
        return Sizes(list(size * jnp.exp(state.log_factor)), None, state)


@dataclass(frozen=True)
class Constant(StepSize):
    """``alpha``.

    Example:
        >>> Constant(0.1).coefficients()
        {'alpha': 0.1}
    """

    def schedule(self, phi: Mapping[str, Array], step: Array) -> float:
        """One."""
        return 1.0


@dataclass(frozen=True)
class PowerLaw(StepSize):
    """``alpha (1 + t / tau)^-power`` after ``t`` steps: it falls, and needs no horizon.

    Attributes:
        initial, feedback: see :class:`StepSize`.
        tau, power: where the coefficients of these names start; ``tau`` in steps.

    Example:
        >>> PowerLaw(0.1, tau=30.0, power=1.0, feedback=Feedback()).coefficients()
        {'alpha': 0.1, 'tau': 30.0, 'power': 1.0, 'gain': 0.02, 'overshoot': 0.02}
    """

    tau: float = 30.0
    power: float = 1.0

    @property
    def scheduled(self) -> bool:
        """True."""
        return True

    def schedule(self, phi: Mapping[str, Array], step: Array) -> Array:
        """``(1 + step / tau)^-power``."""
        return (1 + step / jnp.exp(phi["log_tau"])) ** -jnp.exp(phi["log_power"])


def adapt_step_size(
    phi: Mapping[str, Array], state: StepSizeState, grads: PyTree, step: Array, scheduled: Array | float
) -> StepSizeState:
    """Advance ``c`` by one gradient; the first step leaves it alone.

    The cosine counts as data: nothing is differentiated through it, but ``c`` has a derivative by its coefficients.
    """
    gain, overshoot = jnp.exp(phi["log_gain"]), jnp.exp(phi["log_overshoot"])
    correction = 1 - SQUARE_DECAY ** jnp.maximum(step, 1).astype(jnp.float32)
    cosines = jax.lax.stop_gradient(-_cosines(jax.tree.leaves(grads), jax.tree.leaves(state.update)))
    square = SQUARE_DECAY * state.square + (1 - SQUARE_DECAY) * cosines**2
    z = jnp.clip(cosines * jax.lax.rsqrt(square / correction + TINY), -1.0, 1.0)
    c = state.log_factor + jnp.where(step == 0, 0.0, gain * (z + overshoot))
    return state._replace(square=square, log_factor=jnp.minimum(c, -jnp.log(scheduled)))


def _cosines(a: Sequence[Float[Array, "..."]], b: Sequence[Float[Array, "..."]]) -> Float[Array, " n"]:
    """The cosines of the angles between tensors; zero where one is zero, or its squares are zero or none in float32."""
    products = inner_products([x[None] for x in a], [x[None] for x in b])
    aa, ab, bb = products[:, 0, 0], products[:, 0, 1], products[:, 1, 1]
    tiny = jnp.finfo(jnp.float32).tiny
    cosines = ab * jax.lax.rsqrt(jnp.maximum(aa, tiny)) * jax.lax.rsqrt(jnp.maximum(bb, tiny))
    return jnp.where(jnp.isfinite(ab) & jnp.isfinite(aa) & jnp.isfinite(bb), cosines, 0.0)
