"""The arithmetic of both protocols: smoothing, what has to be reached, and when it is.

Everything here is NumPy, arrays in, arrays out. Curves have one row per seed; ``S`` seeds, ``E`` evaluations.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Target(NamedTuple):
    """What an optimizer has to reach, for each seed.

    Attributes:
        loss: a (smoothed) test loss of a baseline.
        step: the step at which the baseline has it.
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


def first_steps(
    curves: Float[np.ndarray, "S E"], steps: Int[np.ndarray, "E"], loss: Float[np.ndarray, "S"]
) -> Float[np.ndarray, "S"]:
    """The first step with test loss at most ``loss``, for each seed; NaN for a miss."""
    reached = curves <= loss[:, None]
    return np.where(reached.any(axis=1), steps[np.argmax(reached, axis=1)], np.nan)


def mean_and_std(values: Float[np.ndarray, "n"]) -> dict[str, float | None]:
    """``mean`` and sample standard deviation ``std`` of the finite values; None where there are too few of them."""
    finite = values[np.isfinite(values)]
    return {
        "mean": float(finite.mean()) if len(finite) else None,
        "std": float(finite.std(ddof=1)) if len(finite) > 1 else None,
    }
