"""What a per-parameter network reads; the paper's 19 channels, which ``ds`` and ``unf`` take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
TIME_SCALES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
PARAMETER_CHANNELS = 2 + len(DECAYS)
TIME_CHANNELS = len(TIME_SCALES)
EPSILON = 1e-5


@dataclass(frozen=True)
class FeatureSet:
    """The channels of a per-parameter network.

    Attributes:
        channels: number of channels that differ between the entries of a tensor.
        time_channels: number of channels that all parameters share.
        averages: number of moving averages of each gradient.
        advance: ``(averages, gradient) -> averages``.
        of_entries: ``(parameter, gradient, averages, steps taken before) -> [size, channels]``.
        of_time: ``steps taken before -> [time_channels]``.
    """

    channels: int
    time_channels: int
    averages: int
    advance: Callable[[Array, Array], Array]
    of_entries: Callable[[Array, Array, Array, Array], Array]
    of_time: Callable[[Array], Array]


def update_averages(
    averages: Float[Array, "decays *shape"], value: Float[Array, "*shape"], decays: Sequence[float] = DECAYS
) -> Float[Array, "decays *shape"]:
    """Advance exponential moving averages, one for each decay, by one value.

    They start at zero and are not corrected for it: everything that reads them divides them by their root mean square,
    in which a common factor cancels (up to the epsilon in the root, which lets a slow average grow in gradually).
    """
    column = np.asarray(decays).reshape((-1,) + (1,) * value.ndim)
    # One minus the decay in double precision: in single precision 1 - 0.9999 is off in the fourth digit.
    return np.float32(column) * averages + np.float32(1.0 - column) * value


def parameter_features(
    parameter: Float[Array, "*shape"], gradient: Float[Array, "*shape"], averages: Float[Array, "decays *shape"]
) -> Float[Array, "size channels"]:
    """The 8 channels that differ between the entries of one tensor (arXiv:2507.01649, appendix on learned optimizers).

    The parameter, the gradient and the six averages are *first* clipped to [-1, 1] and *then* divided by the root mean
    square, over the tensor, of what was clipped (``EPSILON`` inside the root), each channel by its own.

    Args:
        parameter: one leaf of the parameters.
        gradient: its gradient.
        averages: the moving averages of its gradient, one for each of ``DECAYS``.

    Returns:
        The channels, for the entries of the tensor in row-major order.
    """
    channels = jnp.concatenate([parameter.reshape(1, -1), gradient.reshape(1, -1), averages.reshape(len(DECAYS), -1)])
    clipped = jnp.clip(channels, -1.0, 1.0)
    return (clipped * jax.lax.rsqrt(jnp.mean(clipped**2, axis=1, keepdims=True) + EPSILON)).T


def time_features(count: Int[Array, ""]) -> Float[Array, "times"]:
    """The 11 channels that all parameters share: ``tanh(t / tau - 1)`` of the number of steps taken before this one."""
    return jnp.tanh(count.astype(jnp.float32) / np.asarray(TIME_SCALES, np.float32) - 1.0)


PAPER = FeatureSet(
    PARAMETER_CHANNELS,
    TIME_CHANNELS,
    len(DECAYS),
    update_averages,
    lambda parameter, gradient, averages, _: parameter_features(parameter, gradient, averages),
    time_features,
)
