"""The evaluation protocol's arithmetic: smoothing, the tuned baseline, and the step reduction factor.

Step reduction as in GradMetaNet's learned-optimizer experiments (arXiv:2507.01649): how many times fewer steps than
tuned Adam an optimizer takes to Adam's best test loss. Everything here is NumPy, arrays in, arrays
out. Curves have one row per seed; ``S`` seeds, ``E`` evaluations.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from gmn_lopt.util.errors import UsageError

LEARNING_RATES = tuple(0.0005 * j for j in range(1, 21))
"""The grid that Adam is tuned on."""


class Target(NamedTuple):
    """What an optimizer has to reach, for each seed.

    Attributes:
        loss: the baseline's best (smoothed) test loss.
        step: the step at which the baseline first has it.
    """

    loss: Float[np.ndarray, "S"]
    step: Int[np.ndarray, "S"]


def evaluation_steps(horizon: int, eval_every: int) -> Int[np.ndarray, "E"]:
    """The steps after which the test loss is taken: ``eval_every, 2 eval_every, ..., horizon``."""
    return np.arange(eval_every, horizon + 1, eval_every)


def default_eval_every(horizon: int) -> int:
    """Every step up to 500 steps; beyond, the largest divisor of the horizon that is at most 10."""
    return 1 if horizon <= 500 else max(n for n in range(1, 11) if horizon % n == 0)


def smooth(curves: Float[np.ndarray, "*n E"], window: int) -> Float[np.ndarray, "*n E"]:
    """The trailing running mean over ``window`` evaluations (fewer at the start), losses that are not finite as +inf.

    It is causal: a smoothed value knows nothing of later steps.
    """
    curves = np.where(np.isfinite(curves), curves, np.inf).astype(np.float64)
    if window == 1:
        return curves
    total = np.zeros_like(curves)
    for lag in range(min(window, curves.shape[-1])):
        total[..., lag:] += curves[..., : curves.shape[-1] - lag]
    return total / np.minimum(np.arange(curves.shape[-1]) + 1, window)


def best_setting(curves: Float[np.ndarray, "H S E"]) -> int:
    """The setting of a grid with the best mean over seeds of the best test loss (the first of equals).

    Raises:
        UsageError: if no setting has a finite loss on every seed.
    """
    means = curves.min(axis=2).mean(axis=1)
    if not np.isfinite(means).any():
        raise UsageError("no learning rate of Adam's grid reaches a finite test loss on every seed: check the task")
    return int(np.argmin(means))


def target(curves: Float[np.ndarray, "S E"], steps: Int[np.ndarray, "E"]) -> Target:
    """The baseline's best test loss ``L*`` of each seed and the first step ``n`` that reaches it."""
    return Target(curves.min(axis=1), steps[np.argmin(curves, axis=1)])


def first_steps(
    curves: Float[np.ndarray, "S E"], steps: Int[np.ndarray, "E"], loss: Float[np.ndarray, "S"]
) -> Float[np.ndarray, "S"]:
    """The first step with test loss at most ``loss``, for each seed; NaN for a miss."""
    reached = curves <= loss[:, None]
    return np.where(reached.any(axis=1), steps[np.argmax(reached, axis=1)], np.nan)


def step_reduction(
    curves: Float[np.ndarray, "S E"], steps: Int[np.ndarray, "E"], goal: Target
) -> Float[np.ndarray, "S"]:
    """The step reduction factor of each seed: the baseline's step over the first step to its loss; NaN for a miss."""
    return goal.step / first_steps(curves, steps, goal.loss)


def mean_and_std(values: Float[np.ndarray, "n"]) -> dict[str, float | None]:
    """``mean`` and sample standard deviation ``std`` of the finite values; None where there are too few of them."""
    finite = values[np.isfinite(values)]
    return {
        "mean": float(finite.mean()) if len(finite) else None,
        "std": float(finite.std(ddof=1)) if len(finite) > 1 else None,
    }
