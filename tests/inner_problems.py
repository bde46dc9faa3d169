"""Small inner problems with known answers, for the tests of the estimators."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Smooth:
    """A nonlinear recurrence, optionally noisy; the initial state depends on the meta-parameters too."""

    horizon: int = 6
    loss_cap: float = math.inf
    noise: float = 0.0

    def init(self, phi, data, key):
        return {
            "x": jnp.tanh(phi["b"]) + self.noise * jax.random.normal(key, (2,)),
            "key": key,
            "count": jnp.zeros((), int),
        }

    def step(self, phi, state, data, key):
        x = jnp.tanh(phi["a"] @ state["x"] + phi["b"] + self.noise * jax.random.normal(key, (2,)))
        return {"x": x, "key": key, "count": state["count"] + 1}, jnp.sum((x - data) ** 2)

    def losses(self, phi, data):
        """The losses of one episode without noise, in plain Python."""
        x, losses = jnp.tanh(phi["b"]), []
        for _ in range(self.horizon):
            x = jnp.tanh(phi["a"] @ x + phi["b"])
            losses.append(jnp.sum((x - data) ** 2))
        return jnp.stack(losses)

    def phi(self):
        return {"a": jnp.array([[0.9, -0.4], [0.5, 0.7]]), "b": jnp.array([0.2, -0.3])}

    def data(self):
        return jnp.array([0.5, 0.1])


@dataclass(frozen=True)
class Diverging:
    """Half of the problems blow up, at a rate that depends on the meta-parameter; the others converge."""

    horizon: int = 40
    loss_cap: float = 3.0

    def init(self, phi, data, key):
        return jnp.where(jax.random.bernoulli(key), jnp.ones(2), 1e30 * jnp.ones(2))

    def step(self, phi, state, data, key):
        state = state - phi * state**3
        return state, jnp.sum(state**2)


@dataclass(frozen=True)
class InfluenceBalancing:
    """Influence balancing (arXiv:1702.05043; arXiv:2112.13835, section 5 and appendix).

    The meta-parameter enters the first ``positive`` of the state's entries with a plus sign and the others with a
    minus sign, and travels one entry per step towards the first one, on which the loss depends. In the long run the
    many negative influences win; a short truncation sees only the positive ones.
    """

    size: int = 23
    positive: int = 10
    horizon: int = 100
    loss_cap: float = math.inf

    def init(self, phi, data, key):
        return jnp.ones(self.size)

    def step(self, phi, state, data, key):
        signs = jnp.where(jnp.arange(self.size) < self.positive, 1.0, -1.0)
        state = 0.5 * state + 0.5 * jnp.append(state[1:], 0.0) + phi * signs
        return state, 0.5 * (state[0] - 1) ** 2
