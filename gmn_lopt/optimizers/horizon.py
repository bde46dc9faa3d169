"""The step size and the weight decay where the number of steps is known."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gmn_lopt.optimizers.leaves import Gradient
from gmn_lopt.optimizers.step_size import Sizes, StepSize

# One choice for all tasks, by the validation loss at the end of whole episodes (tools/known_horizon.py,
# docs/findings.md).
PEAK, WARMUP, POWER, WEIGHT_DECAY = 0.03, 0.05, 1.0, 0.05


def known_horizon(
    total_steps: int,
    peak: Float[Array, ""] | float = PEAK,
    warmup: Float[Array, ""] | float = WARMUP,
    power: Float[Array, ""] | float = POWER,
) -> Callable[[Array], Array]:
    """The step size of a direction with a size of its own where the number of steps is known, as an optax schedule.

    It rises in a straight line for a share ``warmup`` of the steps, and falls as a power of a cosine, to zero after the
    last one.

    Example:
        >>> rate = known_horizon(99, peak=0.02, warmup=0.1)
        >>> [round(float(rate(jnp.array(step))), 3) for step in (0, 9, 54, 99)]
        [0.002, 0.02, 0.01, 0.0]
    """

    def rate(step: Array) -> Array:
        share = jnp.clip(jnp.asarray(step + 1, jnp.float32) / (total_steps + 1), 0.0, 1.0)
        falling = jnp.clip((share - warmup) / (1 - warmup), 0.0, 1.0)
        rising = jnp.minimum(1.0, share / jnp.maximum(warmup, 1 / (total_steps + 1)))
        return peak * rising * (0.5 + 0.5 * jnp.cos(jnp.pi * falling)) ** power

    return rate


@dataclass(frozen=True)
class Horizon(StepSize):
    """A schedule over a known number of steps, and the weight decay that goes with it.

    Attributes:
        initial, warmup, power, decay: where the largest step size, the share of warm-up, the power of the cosine
            (:func:`known_horizon`) and the weight decay start: the coefficients ``alpha``, ``warmup``, ``power`` and
            ``decay``.

    Raises:
        ValueError: a coefficient does not start above zero, or there is feedback, which this has in its place.

    Example:
        >>> Horizon(0.02).coefficients()
        {'alpha': 0.02, 'warmup': 0.05, 'power': 1.0, 'decay': 0.05}
    """

    initial: float = PEAK
    warmup: float = WARMUP
    power: float = POWER
    decay: float = WEIGHT_DECAY

    wants_total_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feedback is not None:
            raise ValueError(f"{type(self).__name__} takes no feedback")

    @property
    def scheduled(self) -> bool:
        """True."""
        return True

    def coefficients(self) -> dict[str, float]:
        """Those of the schedule, and the weight decay."""
        return {"alpha": self.initial, "warmup": self.warmup, "power": self.power, "decay": self.decay}

    def schedule(self, phi: Mapping[str, Array], step: Array) -> float:
        """One: what there is of a schedule needs the number of steps."""
        return 1.0

    def update(
        self,
        phi: Mapping[str, Any],
        state: Any,
        gradient: Gradient,
        params: Sequence[Float[Array, "..."]],
        step: Int[Array, ""],
        total_steps: int | None,
    ) -> Sizes:
        """The step size and the weight decay of each tensor; see :meth:`StepSize.update`."""
        size, decay = self.sizes(phi, step, total_steps)
        return Sizes([size] * len(params), [decay] * len(params), state)

    def sizes(
        self, phi: Mapping[str, Any], step: Int[Array, ""], total_steps: int | None
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The step size and the weight decay that are the same for all tensors."""
        assert total_steps is not None
        peak, warmup, power, decay = (jnp.exp(phi[f"log_{name}"]) for name in ("alpha", "warmup", "power", "decay"))
        return known_horizon(total_steps, peak, warmup, power)(step), decay
