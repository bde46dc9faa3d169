"""Train a flax.linen model with a pretrained learned optimizer: python -m examples.linen_digits."""

import flax.linen as nn
import jax
import optax

import gmn_lopt
from examples._digits import batches


class Model(nn.Module):
    """A multi-layer perceptron, 64-32-10."""

    @nn.compact
    def __call__(self, x):
        """The logits."""
        return nn.Dense(10)(nn.relu(nn.LayerNorm()(nn.Dense(32)(x))))


def main(steps: int = 200) -> float:
    """Train; returns the loss on the last batch, before its step."""
    model = Model()
    x, y = next(batches(1))
    params = model.init(jax.random.key(0), x)

    def loss_fn(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    structure = gmn_lopt.analyze(loss_fn, params, x, y)
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
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")
    return losses[-1]


if __name__ == "__main__":
    main()
