"""Features that do not depend on the scale of the loss or of the parameters, nor on time.

After Celo2 (Moudgil et al., ICLR 2026, arXiv:2602.19142) and the small learned optimizers that it descends from (Metz
et al. 2022, arXiv:2203.11860): gradient, parameter, three momenta, the second moment, and its row and column means as
in Adafactor (Shazeer and Stern 2018, arXiv:1804.04235). No clock: how far training has come is the business of the
schedule that the user gives.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gmn_lopt.optimizers.features.base import Features
from gmn_lopt.optimizers.features.paper import update_averages

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
SQUARES_DECAY = 0.999
# Relative to the mean of the second moment over the tensor.
RELATIVE_EPSILON = 1e-6
TINY = 1e-30
# Entries of the gradient above it count as so large in the second moment: float32 ends at 3e38.
LARGE = 1e15


@dataclass(frozen=True)
class ScaleFree(Features):
    """Fifteen channels of each entry, each divided by its root mean square over the tensor.

    Gradient and parameter; for each momentum itself, divided by the root of the second moment, and by the root of
    Adafactor's rank-1 estimate of it; the gradient divided by the latter; the inverse roots of the second moment and of
    its row and column means (the last two axes; of the second moment itself where there is but one).

    Example:
        >>> ScaleFree().of_entries(*(jnp.ones(3),) * 2, jnp.ones((4, 3)), jnp.array(0)).shape
        (3, 15)
    """

    channels = 2 + 3 * len(MOMENTUM_DECAYS) + 4
    time_channels = 0
    averages = len(MOMENTUM_DECAYS) + 1

    def advance(self, averages: Array, gradient: Array) -> Array:
        """Advance the three momenta and, last, the average squared gradient."""
        momenta = update_averages(averages[:-1], gradient, MOMENTUM_DECAYS)
        squares = jnp.clip(gradient, -LARGE, LARGE) ** 2
        return jnp.concatenate([momenta, update_averages(averages[-1:], squares, (SQUARES_DECAY,))])

    def of_entries(self, parameter: Array, gradient: Array, averages: Array, count: Array) -> Array:
        """The channels of one tensor's entries."""
        steps = count.astype(jnp.float32) + 1.0
        decays = np.asarray((*MOMENTUM_DECAYS, SQUARES_DECAY), np.float32)
        corrected = averages / (1.0 - decays**steps).reshape((-1,) + (1,) * gradient.ndim)
        momenta, squares = corrected[:-1], corrected[-1]
        squares = squares + RELATIVE_EPSILON * squares.mean() + TINY
        # All have one decay, so the means of the averages are the averages of the means: no state of their own.
        rows, columns = squares, squares
        if gradient.ndim >= 2:
            rows, columns = squares.mean(-1, keepdims=True), squares.mean(-2, keepdims=True)
            factored = rows * (columns / rows.mean(-2, keepdims=True))  # the product of both would underflow
        else:
            factored = squares
        whiten, whiten_factored = jax.lax.rsqrt(squares), jax.lax.rsqrt(factored)
        channels = [
            gradient,
            parameter,
            *momenta,
            *(m * whiten for m in momenta),
            *(m * whiten_factored for m in momenta),
        ]
        channels += [gradient * whiten_factored, whiten, jax.lax.rsqrt(rows), jax.lax.rsqrt(columns)]
        flat = jnp.stack([jnp.broadcast_to(c, gradient.shape).reshape(-1) for c in channels])
        # Divided by the largest entry first: squares of small gradients would underflow.
        flat = flat / jnp.maximum(jnp.abs(flat).max(1, keepdims=True, initial=0.0), TINY)
        return (flat * jax.lax.rsqrt(jnp.mean(flat**2, axis=1, keepdims=True) + TINY)).T

    def of_time(self, count: Array) -> Array:
        """None: how far training has come is the business of the step size."""
        return jnp.zeros(0, jnp.float32)
