"""Train a flax.nnx model with a pretrained learned optimizer: python -m examples.nnx_digits.

nnx models carry their parameters: split them off, and the loss is a pure function of them.
"""

import jax
import optax
from flax import nnx

import gmn_lopt
from examples._digits import batches


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
    graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)

    def loss_fn(params, x, y):
        logits = nnx.merge(graph, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    structure = gmn_lopt.analyze(loss_fn, params, *next(batches(1)))
    tx = gmn_lopt.load("fashion_mnist_mlp-ds+gmn", structure)
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, y):
        loss, grads, factors = gmn_lopt.value_grad_and_factors(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for x, y in batches(steps):
        params, state, loss = step(params, state, x, y)
        losses.append(float(loss))
    trained = nnx.merge(graph, params)  # a model again
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps of {type(trained).__name__}")
    return losses[-1]


if __name__ == "__main__":
    main()
