"""Train a Haiku model with a pretrained learned optimizer: ``python examples/haiku_digits.py``."""

import haiku as hk
import jax
import optax

import gmn_lopt
from gmn_lopt.tasks import load_task


def main(steps: int = 200) -> float:
    """Train; returns the loss on the last batch, before its step."""
    digits = load_task("digits_mlp")  # only its data, 1,797 images of 8x8 pixels
    batch = digits.sample(jax.random.key(0), digits.data["train"])
    model = hk.transform(lambda x: hk.nets.MLP([32, 10])(x))
    params = model.init(jax.random.key(0), batch["image"])

    def loss_fn(params, batch):
        logits = model.apply(params, None, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    tx = gmn_lopt.load("default", gmn_lopt.analyze(loss_fn, params, batch))
    state = tx.init(params)

    @jax.jit
    def update(params, state, batch):
        loss, grads, factors = gmn_lopt.value_grad_and_factors(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for i in range(steps):
        batch = digits.sample(jax.random.key(i), digits.data["train"])
        params, state, loss = update(params, state, batch)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")
    return losses[-1]


if __name__ == "__main__":
    main()
