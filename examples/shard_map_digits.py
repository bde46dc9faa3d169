"""Data parallel by hand, on eight simulated devices: ``python examples/shard_map_digits.py``.

Each device computes gradient and factors of its shard of the batch; ``pmean`` and ``gather_factors`` make them those of
the whole batch, and every device takes the same step. In ``pmap`` the function is the same.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import gmn_lopt
from gmn_lopt.tasks import load_task


def loss_fn(params, batch):
    """A multi-layer perceptron's cross-entropy, the mean over the batch, or over a shard of it."""
    hidden = jax.nn.relu(batch["image"] @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def main(steps: int = 200) -> float:
    """Train; returns the loss on the last batch, before its step."""
    digits = load_task("digits_mlp")  # only its data, 1,797 images of 8x8 pixels
    keys, lecun = jax.random.split(jax.random.key(0)), jax.nn.initializers.lecun_normal()
    params = {"w1": lecun(keys[0], (64, 32)), "b1": jnp.zeros(32), "w2": lecun(keys[1], (32, 10)), "b2": jnp.zeros(10)}
    batch = digits.sample(jax.random.key(0), digits.data["train"])
    tx = gmn_lopt.load("default", gmn_lopt.analyze(loss_fn, params, batch))  # with the whole batch
    state = tx.init(params)

    def mean_loss(params, batch):
        return jax.lax.pmean(loss_fn(params, batch), "data")

    def step(params, state, batch):
        loss, grads, factors = gmn_lopt.value_grad_and_factors(mean_loss)(params, batch)
        grads, factors = jax.lax.pmean(grads, "data"), gmn_lopt.gather_factors(factors, "data")
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, loss

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()))

    losses = []
    for i in range(steps):
        batch = digits.sample(jax.random.key(i), digits.data["train"])
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps on {jax.device_count()} devices")
    return losses[-1]


if __name__ == "__main__":
    main()
