"""Train a convolutional flax.linen model with a pretrained learned optimizer: ``python examples/cnn_digits.py``."""

import flax.linen as nn
import jax
import optax

import gmn_lopt
from gmn_lopt.tasks import load_task


class Model(nn.Module):
    """Two convolutions, the second with a stride, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        """The logits."""
        x = x.reshape(-1, 8, 8, 1)
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), (2, 2))(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def main(steps: int = 200) -> float:
    """Train; returns the loss on the last batch, before its step."""
    digits = load_task("digits_mlp")  # only its data, 1,797 images of 8x8 pixels
    batch = digits.sample(jax.random.key(0), digits.data["train"])
    model = Model()
    params = model.init(jax.random.key(0), batch["image"])

    def loss_fn(params, batch):
        logits = model.apply(params, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    structure = gmn_lopt.analyze(loss_fn, params, batch)
    print(structure)  # channels are neurons; the set is examples and positions
    tx = gmn_lopt.load("default", structure)
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
