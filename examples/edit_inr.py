"""Edit one's own SIREN, a network that shows an image: ``python examples/edit_inr.py``.

The editor is the one that ``make experiments`` trains on digits' networks, to dilate what they show. It reads the
network's weights and, by GradMetaNet, gradients at 32 pixels whose values in the edited image are known. ``fit`` is any
training of a SIREN.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import gmn_lopt
from gmn_lopt.tasks.data.images import resize

EDITOR = Path("runs/inr_editing/quick/gmn_gradmetanet_seed_0/editor")
PIXELS = jnp.stack(jnp.meshgrid(*2 * [jnp.linspace(-1, 1, 16)], indexing="ij"), -1).reshape(-1, 2)


def forward(params, points):
    """The values of all neurons, layer by layer; those of the last layer are the image's."""
    first = jnp.sin(30 * (points @ params["w0"] + params["b0"]))
    second = jnp.sin(30 * (first @ params["w1"] + params["b1"]))
    return first, second, second @ params["w2"] + params["b2"]


def fit(image, steps):
    """Fit a SIREN 2-32-32-1 to an image, from the usual initial weights."""
    drawn = iter(jax.random.split(jax.random.key(0), 6))
    uniform = lambda shape, bound: jax.random.uniform(next(drawn), shape, minval=-bound, maxval=bound)  # noqa: E731
    params = {"w0": uniform((2, 32), 0.5), "w1": uniform((32, 32), 0.0144), "w2": uniform((32, 1), 0.0144)}
    params |= {"b0": uniform((32,), 0.7), "b1": uniform((32,), 0.18), "b2": uniform((1,), 0.18)}
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda p: ((forward(p, PIXELS)[-1] - image) ** 2).mean())(params)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def main(steps: int = 200) -> float:
    """Edit a network; returns the mean squared error of what it shows then."""
    image = resize(load_digits().images[-1:, :, :, None], 16)[0, :, :, 0] / 16 - 0.5
    target = np.pad(image, 1, constant_values=-0.5)  # the image as it is to be: dilated
    target = np.lib.stride_tricks.sliding_window_view(target, (3, 3)).max((2, 3))
    params = fit(image.reshape(-1, 1), steps)

    editor = gmn_lopt.load_editor(EDITOR, forward, params)
    rows, columns = np.rint((editor.points + 1) * 7.5).astype(int).T
    edited = editor(params, target[rows, columns, None])
    before, after = (
        float(((values.reshape(16, 16) - target) ** 2).mean())
        for values in (forward(params, PIXELS)[-1], gmn_lopt.networks.shown(forward, edited, PIXELS))
    )
    print(f"error {before:.3f} before the edit, {after:.3f} after it")
    return after


if __name__ == "__main__":
    main()
