"""A physics-informed network: its loss is of derivatives of the network in its inputs."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gmn_lopt.meta import Task
from gmn_lopt.tasks.data import batches


class Network(nn.Module):
    """Three hidden layers with tanh units."""

    width: int = 32

    @nn.compact
    def __call__(self, x: Float[Array, "batch 2"]) -> Float[Array, "batch 1"]:
        """The solution at points in time and space."""
        for _ in range(3):
            x = jnp.tanh(nn.Dense(self.width)(x))
        return nn.Dense(1)(x)


def pinn(data_dir: str | None = None, *, horizon: int = 500, batch_size: int = 64) -> Task:
    """Burgers' equation ``u_t + u u_x = 0.05 u_xx`` on [0, 1] x [-1, 1] (Raissi, Perdikaris and Karniadakis 2019).

    The loss is the mean squared residual and the squared errors at the start, ``-sin(pi x)``, and at both ends, 0.
    """
    model, viscosity = Network(), 0.05

    def init(key: jax.Array) -> PyTree:
        return model.init(key, jnp.zeros((1, 2)))["params"]

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        def u(points: Float[Array, "batch 2"]) -> Float[Array, "batch"]:
            values: Any = model.apply({"params": params}, points)
            return values[:, 0]

        points = batch["inside"]
        along = lambda i: jnp.zeros_like(points).at[:, i].set(1.0)  # noqa: E731
        value, in_time = jax.jvp(u, (points,), (along(0),))
        slope = lambda points: jax.jvp(u, (points,), (along(1),))[1]  # noqa: E731
        in_space, curvature = jax.jvp(slope, (points,), (along(1),))
        residual = in_time + value * in_space - viscosity * curvature
        start = u(batch["start"]) + jnp.sin(math.pi * batch["start"][:, 1])
        return jnp.mean(residual**2) + jnp.mean(start**2) + jnp.mean(u(batch["ends"]) ** 2)

    rng = np.random.default_rng(0)

    def points(count: int) -> dict[str, np.ndarray]:
        time, space = rng.uniform(0, 1, (3, count)), rng.uniform(-1, 1, (3, count))
        time[1], space[2] = 0.0, np.sign(space[2])
        drawn = np.stack([time, space], axis=2).astype(np.float32)
        return dict(zip(("inside", "start", "ends"), drawn))

    data = {"train": points(20000), "valid": points(1000), "test": points(1000)}
    return Task("pinn", horizon, batch_size, 5.0, data, init, loss, batches(batch_size))
