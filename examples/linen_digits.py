"""Train a flax.linen model with a pretrained learned optimizer: ``python examples/linen_digits.py``.

The loop is that of flax's documentation, with its TrainState; only ``apply_gradients`` is ours, for it takes factors.
"""

import flax.linen as nn
import jax
import optax
from flax.training.train_state import TrainState

import gmn_lopt
from gmn_lopt.tasks import load_task


class Model(nn.Module):
    """A multi-layer perceptron, 64-32-10."""

    @nn.compact
    def __call__(self, x):
        """The logits."""
        return nn.Dense(10)(nn.relu(nn.LayerNorm()(nn.Dense(32)(x))))


def main(steps: int = 200) -> float:
    """Train; returns the loss on the last batch, before its step."""
    digits = load_task("digits_mlp")  # only its data, 1,797 images of 8x8 pixels
    batch = digits.sample(jax.random.key(0), digits.data["train"])
    model = Model()
    params = model.init(jax.random.key(0), batch["image"])["params"]

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    tx = gmn_lopt.load("default", gmn_lopt.analyze(loss_fn, params, batch))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def train_step(state, batch):
        loss, grads, factors = gmn_lopt.value_grad_and_factors(loss_fn)(state.params, batch)
        return gmn_lopt.apply_gradients(state, grads=grads, factors=factors), loss

    losses = []
    for i in range(steps):
        batch = digits.sample(jax.random.key(i), digits.data["train"])
        state, loss = train_step(state, batch)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")
    return losses[-1]


if __name__ == "__main__":
    main()
