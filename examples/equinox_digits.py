"""Train an Equinox model with a pretrained learned optimizer: ``python examples/equinox_digits.py``.

An Equinox model is a pytree that also holds functions: its arrays are the parameters.
"""

import equinox as eqx
import jax
import optax

import gmn_lopt
from gmn_lopt.tasks import load_task


def main(steps: int = 200) -> float:
    """Train; returns the loss on the last batch, before its step."""
    digits = load_task("digits_mlp")  # only its data, 1,797 images of 8x8 pixels
    model = eqx.nn.MLP(64, 10, width_size=32, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, batch):
        logits = jax.vmap(eqx.combine(params, static))(batch["image"])  # Equinox's layers take one example
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    batch = digits.sample(jax.random.key(0), digits.data["train"])
    tx = gmn_lopt.load("default", gmn_lopt.analyze(loss_fn, params, batch))
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        loss, grads, factors = gmn_lopt.value_grad_and_factors(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for i in range(steps):
        batch = digits.sample(jax.random.key(i), digits.data["train"])
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")
    return losses[-1]


if __name__ == "__main__":
    main()
