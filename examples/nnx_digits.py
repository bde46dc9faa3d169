"""Train a flax.nnx model with a pretrained learned optimizer: ``python examples/nnx_digits.py``.

nnx models carry their parameters: split them off, and the loss is a pure function of them.
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
    graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)

    def loss_fn(params, batch):
        logits = nnx.merge(graph, params)(batch["image"])
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
    trained = nnx.merge(graph, params)  # a model again
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps of {type(trained).__name__}")
    return losses[-1]


if __name__ == "__main__":
    main()
