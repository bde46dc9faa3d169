"""Data parallel in every way that JAX has, on eight devices, against one: prints what test_parallel.py asserts.

Run as a program, for the number of devices is fixed when JAX starts. The loss is a regression's: a softmax does not see
one direction of the logits, where a step is rounding, orthogonalised.
"""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gmn_lopt

STEPS, DEVICES = 20, 8
AUTO, EXPLICIT = (jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,)) for kind in (AxisType.Auto, AxisType.Explicit))


def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] - y) ** 2)


def mean_loss(*args):
    return jax.lax.pmean(loss_fn(*args), "data")


def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"b1": jnp.zeros(16), "w1": jax.random.normal(keys[0], (8, 16)) / 3}
    params["w2"] = jax.random.normal(keys[1], (16, 4)) / 4
    x = jax.random.normal(keys[2], (64, 8))
    return params, x, jnp.tanh(x[:, :4] * x[:, 4:])


def step(tx, params, state, x, y):
    """On arrays of the whole batch."""
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss_fn)(params, x, y)
    updates, state = tx.update(grads, state, params, factors=factors)
    return optax.apply_updates(params, updates), state


def step_of_shard(loss, vary, tx, params, state, x, y):
    """On each device's shard; ``vary`` makes the parameters each device's own."""
    own = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params) if vary else params
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(own, x, y)
    grads, factors = jax.lax.pmean(grads, "data"), gmn_lopt.gather_factors(factors, "data")
    updates, state = tx.update(grads, state, params, factors=factors)
    return optax.apply_updates(params, updates), state


def by_jit(mesh, tx, params, x, y, steps=STEPS, jit=jax.jit):
    params, x, y = jax.device_put((params, x, y), tuple(NamedSharding(mesh, spec) for spec in (P(), P("data"), P("data"))))
    return loop(jit(partial(step, tx)), params, tx.init(params), x, y, steps)


def by_shard_map(loss, vary, check_vma, tx, params, x, y):
    specs = (P(), P(), P("data"), P("data"))
    mapped = partial(jax.shard_map, mesh=AUTO, in_specs=specs, out_specs=P(), check_vma=check_vma)
    return loop(jax.jit(mapped(partial(step_of_shard, loss, vary, tx))), params, tx.init(params), x, y)


def by_pmap(loss, tx, params, x, y):
    params, state = jax.tree.map(lambda a: jnp.stack([a] * DEVICES), (params, tx.init(params)))
    x, y = (a.reshape(DEVICES, -1, a.shape[-1]) for a in (x, y))
    return loop(jax.pmap(partial(step_of_shard, loss, False, tx), axis_name="data"), params, state, x, y)


def loop(step, params, state, x, y, steps=STEPS):
    for _ in range(steps):
        params, state = step(params, state, x, y)
    return params


MODES = {
    "jit": partial(by_jit, AUTO),
    "jit, explicit axes": partial(by_jit, EXPLICIT),
    "shard_map": partial(by_shard_map, mean_loss, False, True),
    "shard_map, own parameters": partial(by_shard_map, loss_fn, True, True),
    "shard_map without check_vma": partial(by_shard_map, loss_fn, False, False),
    "pmap": partial(by_pmap, loss_fn),
}


def replicas(params):
    """The parameters on every device."""
    return [[np.asarray(leaf.addressable_shards[i].data) for leaf in jax.tree.leaves(params)] for i in range(DEVICES)]


def main(optimizers):
    assert len(jax.devices()) == DEVICES
    params, x, y = problem()
    structure = gmn_lopt.analyze(loss_fn, params, x, y)
    for name in optimizers:
        tx = gmn_lopt.load(name, structure)
        one = jax.tree.leaves(loop(jax.jit(partial(step, tx)), params, tx.init(params), x, y))
        for mode, train in MODES.items():
            first, *others = replicas(train(tx, params, x, y))
            error = max(float(np.abs(a.reshape(b.shape) - b).max()) for a, b in zip(first, one, strict=True))
            equal = all(a.tobytes() == b.tobytes() for other in others for a, b in zip(first, other, strict=True))
            print(json.dumps({"mode": mode, "optimizer": name, "error": error, "equal": equal}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
