"""Train an Equinox model with a pretrained learned optimizer: python -m examples.equinox_digits.

An Equinox model is a pytree that also holds functions: its arrays are the parameters.
"""

import equinox as eqx
import jax
import optax

import gmn_lopt
from examples._digits import batches


def main(steps: int = 200) -> float:
    """Train; returns the loss on the last batch, before its step."""
    model = eqx.nn.MLP(64, 10, width_size=32, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, x, y):
        logits = jax.vmap(eqx.combine(params, static))(x)  # Equinox's layers take one example
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
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")
    return losses[-1]


if __name__ == "__main__":
    main()
