"""Linear regression with two weights, small enough to draw: a picture of how an optimizer uses the gradient's factors.

The target is 0, so the loss is a quadratic bowl ``w' E[x x'] w`` with its minimum at the origin. Inputs come from an
even mixture of two Gaussians at (1, 2) and (2, 1), which makes the bowl long in the direction (1, -1): its curvature
there is ``1 + 2 STD^2``, against ``9 + 2 STD^2`` in the direction (1, 1).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gmn_lopt.meta.task import Task

CENTRES = ((1.0, 2.0), (2.0, 1.0))
STD = 0.2  # of both Gaussians, in each coordinate: the two groups of inputs stay apart


def make(data_dir: str | None = None, *, batch_size: int = 128, horizon: int = 10) -> Task:
    """Two weights without a bias, from a standard normal start; ``data_dir`` is not used.

    Args:
        batch_size: inputs per batch.
        horizon: number of training steps.
    """
    del data_dir
    if min(batch_size, horizon) < 1:
        raise ValueError("batch_size and horizon must be at least 1")

    def init(key: jax.Array) -> PyTree:
        return {"layer_0": {"kernel": jax.random.normal(key, (2, 1))}}

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        return jnp.mean((batch["input"] @ params["layer_0"]["kernel"]) ** 2)

    def sample(key: jax.Array, split: PyTree) -> PyTree:
        del split  # every batch is drawn afresh
        return {"input": draw(key, batch_size)}

    # Fixed draws, of which only "test" is ever looked at.
    keys = dict(zip(("train", "valid", "test"), jax.random.split(jax.random.key(0), 3)))
    data = {split: {"input": np.asarray(draw(key, 1024))} for split, key in keys.items()}
    # The loss at the start is 5 on average and above 60 in 3 of 10,000 cases: only what diverges reaches the cap.
    return Task("linear_regression", horizon, batch_size, 100.0, data, init, loss, sample)


def draw(key: jax.Array, number: int) -> Float[Array, "number 2"]:
    """Draw inputs from the mixture."""
    component_key, noise_key = jax.random.split(key)
    component = jax.random.bernoulli(component_key, shape=(number, 1))
    centre = jnp.where(component, jnp.array(CENTRES[0]), jnp.array(CENTRES[1]))
    return centre + STD * jax.random.normal(noise_key, (number, 2))
