"""Train a flax.nnx model with a pretrained learned optimizer: ``python examples/nnx_digits.py``.

The loop is that of flax's documentation, with its Optimizer, which hands on ``factors``. A model that also has other
state, such as batch statistics, is split: docs/use.md.
"""

import jax
import optax
from flax import nnx

import gmn_lopt
from gmn_lopt.tasks import load_task


class Model(nnx.Module):
    """A multi-layer perceptron, 64-32-10."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.output = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        """The logits."""
        return self.output(nnx.relu(self.norm(self.hidden(x))))


def main(steps: int = 200) -> float:
    """Train; returns the loss on the last batch, before its step."""
    digits = load_task("digits_mlp")  # only its data, 1,797 images of 8x8 pixels
    model = Model(nnx.Rngs(0))

    def loss_fn(model, batch):
        logits = model(batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    batch = digits.sample(jax.random.key(0), digits.data["train"])
    tx = gmn_lopt.load("default", gmn_lopt.analyze(loss_fn, model, batch))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch):
        loss, grads, factors = gmn_lopt.value_grad_and_factors(loss_fn)(model, batch)
        optimizer.update(model, grads, factors=factors)
        return loss

    losses = []
    for i in range(steps):
        batch = digits.sample(jax.random.key(i), digits.data["train"])
        losses.append(float(train_step(model, optimizer, batch)))
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")
    return losses[-1]


if __name__ == "__main__":
    main()
