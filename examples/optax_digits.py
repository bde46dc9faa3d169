"""A learned optimizer inside optax: ``python examples/optax_digits.py``.

It is a GradientTransformationExtraArgs like any other: here behind clipping, with weight decay and a schedule after it,
and one step for every two batches, with their mean gradient and the factors of the second. Only ``factors`` are new,
an extra argument that optax hands on. This optimizer reads the set by GradMetaNet.
"""

import jax
import jax.numpy as jnp
import optax

import gmn_lopt
from gmn_lopt.tasks import load_task


def loss_fn(params, batch):
    """A multi-layer perceptron's cross-entropy."""
    hidden = jax.nn.relu(batch["image"] @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def main(steps: int = 200) -> float:
    """Train; returns the loss on the last batch, before its step."""
    digits = load_task("digits_mlp")  # only its data, 1,797 images of 8x8 pixels
    keys, lecun = jax.random.split(jax.random.key(0)), jax.nn.initializers.lecun_normal()
    params = {"w1": lecun(keys[0], (64, 32)), "b1": jnp.zeros(32), "w2": lecun(keys[1], (32, 10)), "b2": jnp.zeros(10)}

    batch = digits.sample(jax.random.key(0), digits.data["train"])
    structure = gmn_lopt.analyze(loss_fn, params, batch)
    learned = optax.chain(
        optax.clip_by_global_norm(1.0),
        gmn_lopt.load("fashion_mnist_mlp-ds+gmn", structure),  # its updates are the steps, sign and size included
        optax.add_decayed_weights(-1e-4),  # so weights decay with a minus sign, and a schedule only scales
        optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, steps)),
    )
    tx = optax.MultiSteps(learned, every_k_schedule=2)
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
