"""The paper's 19 features of a parameter entry (arXiv:2507.01649, appendix on learned optimizers)."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gmn_lopt.optimizers.features.base import Features

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
TIME_SCALES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
EPSILON = 1e-5


def update_averages(
    averages: Float[Array, "decays *shape"], value: Float[Array, "*shape"], decays: Sequence[float]
) -> Float[Array, "decays *shape"]:
    """Advance exponential moving averages, one for each decay, by one value.

    They start at zero and are not corrected for it: everything that reads them divides them by their root mean square,
    in which a common factor cancels (up to the epsilon in the root, which lets a slow average grow in gradually).
    """
    column = np.asarray(decays).reshape((-1,) + (1,) * value.ndim)
    # One minus the decay in double precision: in single precision 1 - 0.9999 is off in the fourth digit.
    return np.float32(column) * averages + np.float32(1.0 - column) * value


@dataclass(frozen=True)
class PaperFeatures(Features):
    """The parameter, the gradient, six moving averages of it, and eleven of the time: 19 channels.

    The first eight are *first* clipped to [-1, 1] and *then* divided by the root mean square, over the tensor, of what
    was clipped (``EPSILON`` inside the root), each channel by its own. The time features are ``tanh(t / tau - 1)`` of
    the number ``t`` of steps taken before this one, for each ``tau`` of ``TIME_SCALES``.

    Example:
        >>> PaperFeatures().of_time(jnp.array(0)).shape
        (11,)
    """

    channels = 2 + len(DECAYS)
    time_channels = len(TIME_SCALES)
    averages = len(DECAYS)

    def advance(self, averages: Array, gradient: Array) -> Array:
        """Advance the moving averages, one for each of ``DECAYS``."""
        return update_averages(averages, gradient, DECAYS)

    def of_entries(self, parameter: Array, gradient: Array, averages: Array, count: Array) -> Array:
        """The eight channels that differ between the entries."""
        channels = jnp.concatenate(
            [parameter.reshape(1, -1), gradient.reshape(1, -1), averages.reshape(len(DECAYS), -1)]
        )
        clipped = jnp.clip(channels, -1.0, 1.0)
        return (clipped * jax.lax.rsqrt(jnp.mean(clipped**2, axis=1, keepdims=True) + EPSILON)).T

    def of_time(self, count: Array) -> Array:
        """The eleven channels that all parameters share."""
        return jnp.tanh(count.astype(jnp.float32) / np.asarray(TIME_SCALES, np.float32) - 1.0)
