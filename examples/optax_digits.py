"""A learned optimizer inside optax: python -m examples.optax_digits.

It is a GradientTransformationExtraArgs like any other: here behind clipping, with weight decay and a schedule after it,
and one step for every two batches, with their mean gradient and the factors of the second. Only ``factors`` are new,
an extra argument that optax hands on.
"""

import jax
import jax.numpy as jnp
import optax

import gmn_lopt
from examples._digits import batches

SIZES = (64, 32, 10)


def loss_fn(params, x, y):
    """A multi-layer perceptron's cross-entropy."""
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["w2"] + params["b2"], y).mean()


def main(steps: int = 200) -> float:
    """Train; returns the loss on the last batch, before its step."""
    keys = jax.random.split(jax.random.key(0))
    params = {}
    for i in (1, 2):
        params[f"w{i}"] = jax.nn.initializers.lecun_normal()(keys[i - 1], SIZES[i - 1 : i + 1])
        params[f"b{i}"] = jnp.zeros(SIZES[i])

    structure = gmn_lopt.analyze(loss_fn, params, *next(batches(1)))
    learned = optax.chain(
        optax.clip_by_global_norm(1.0),
        gmn_lopt.load("fashion_mnist_mlp-ds+gmn", structure),  # its updates are the steps, sign and size included
        optax.add_decayed_weights(-1e-4),  # so weights decay with a minus sign, and a schedule only scales
        optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, steps)),
    )
    tx = optax.MultiSteps(learned, every_k_schedule=2)
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
