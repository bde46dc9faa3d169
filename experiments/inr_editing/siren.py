"""SIREN (Sitzmann et al. 2020, arXiv:2006.09661): a network from coordinates to the values of one image."""

import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

OMEGA = 30.0
HIDDEN = (32, 32)  # arXiv:2507.01649, appendix F.3

Params = dict[str, Array]


def init(key: jax.Array, channels: int) -> Params:
    """Draw the weights of a SIREN 2-32-32-``channels``.

    As in section 3.2 there, those of the first layer are uniform in ``+- 1 / 2``, later ones in
    ``+- sqrt(6 / fan_in) / OMEGA``. Biases, of which it says nothing, are uniform in ``+- 1 / sqrt(fan_in)``.

    Example:
        >>> {name: weights.shape for name, weights in init(jax.random.key(0), 3).items()}
        {'b0': (32,), 'b1': (32,), 'b2': (3,), 'w0': (2, 32), 'w1': (32, 32), 'w2': (32, 3)}
    """
    sizes = (2, *HIDDEN, channels)
    params = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        key, for_weights, for_bias = jax.random.split(key, 3)
        bound = 1 / rows if i == 0 else math.sqrt(6 / rows) / OMEGA
        params[f"w{i}"] = jax.random.uniform(for_weights, (rows, columns), minval=-bound, maxval=bound)
        reach = 1 / math.sqrt(rows)
        params[f"b{i}"] = jax.random.uniform(for_bias, (columns,), minval=-reach, maxval=reach)
    return dict(sorted(params.items()))


def forward(params: Params, points: Float[Array, "points 2"]) -> tuple[Float[Array, "points _"], ...]:
    """The values of all neurons, layer by layer; those of the last layer are the image's.

    Example:
        >>> [x.shape for x in forward(init(jax.random.key(0), 3), jnp.zeros((5, 2)))]
        [(5, 32), (5, 32), (5, 3)]
    """
    values, last = [points], len(params) // 2 - 1
    for i in range(last):
        values.append(jnp.sin(OMEGA * (values[-1] @ params[f"w{i}"] + params[f"b{i}"])))
    return (*values[1:], values[-1] @ params[f"w{last}"] + params[f"b{last}"])


def grid(height: int, width: int) -> Float[Array, "pixels 2"]:
    """The coordinates (row, column) of all pixels, row by row, from -1 to 1.

    Example:
        >>> grid(2, 2).tolist()
        [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
    """
    rows, columns = jnp.linspace(-1, 1, height), jnp.linspace(-1, 1, width)
    return jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
