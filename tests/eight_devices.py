"""Data parallel in every way that JAX has, on eight devices, against one: prints what test_parallel.py asserts.

Run as a program, for the number of devices is fixed when JAX starts. The loss is a regression's: a softmax does not see
one direction of the logits, where a step is rounding, orthogonalised.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gmn_lopt

STEPS, DEVICES = 20, 8
AUTO, EXPLICIT = (
    jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,)) for kind in (AxisType.Auto, AxisType.Explicit)
)


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


def by_jit(mesh, tx, params, x, y):
    params, x, y = jax.device_put(
        (params, x, y), tuple(NamedSharding(mesh, spec) for spec in (P(), P("data"), P("data")))
    )
    return loop(jax.jit(partial(step, tx)), params, tx.init(params), x, y)


def by_shard_map(loss, vary, check_vma, tx, params, x, y):
    specs = (P(), P(), P("data"), P("data"))
    mapped = partial(jax.shard_map, mesh=AUTO, in_specs=specs, out_specs=P(), check_vma=check_vma)
    return loop(jax.jit(mapped(partial(step_of_shard, loss, vary, tx))), params, tx.init(params), x, y)


def by_pmap(loss, tx, params, x, y):
    params, state = jax.tree.map(lambda a: jnp.stack([a] * DEVICES), (params, tx.init(params)))
    x, y = (a.reshape(DEVICES, -1, a.shape[-1]) for a in (x, y))
    return loop(jax.pmap(partial(step_of_shard, loss, False, tx), axis_name="data"), params, state, x, y)


def by_micro_batches(tx, params, x, y):
    """Each half of the batch on all devices, and the factors of both for one step."""
    twice = gmn_lopt.multi_steps(tx, 2, gmn_lopt.analyze(loss_fn, params, x, y))
    specs = (P(), P(), P("data"), P("data"))
    mapped = jax.shard_map(partial(step_of_shard, mean_loss, False, twice), mesh=AUTO, in_specs=specs, out_specs=P())
    compiled, halves = jax.jit(mapped), list(zip(jnp.split(x, 2), jnp.split(y, 2), strict=True))

    def both(params, state, *_):
        for half in halves:
            params, state = compiled(params, state, *half)
        return params, state

    return loop(both, params, twice.init(params), x, y)


def loop(step, params, state, x, y):
    for _ in range(STEPS):
        params, state = step(params, state, x, y)
    return params


MODES = {
    "jit": partial(by_jit, AUTO),
    "jit, explicit axes": partial(by_jit, EXPLICIT),
    "shard_map": partial(by_shard_map, mean_loss, False, True),
    "shard_map, own parameters": partial(by_shard_map, loss_fn, True, True),
    "shard_map without check_vma": partial(by_shard_map, loss_fn, False, False),
    "pmap": partial(by_pmap, loss_fn),
    "shard_map, micro-batches": by_micro_batches,
}


# GradMetaNet takes long to compile: in one mode for each way that factors come about.
RUNS = {"default": list(MODES), "default+gmn": ["jit, explicit axes", "shard_map", "pmap"]}


def replicas(params):
    """The parameters on every device."""
    return [[np.asarray(leaf.addressable_shards[i].data) for leaf in jax.tree.leaves(params)] for i in range(DEVICES)]


def distance(tree, other):
    """The largest difference, relative to the largest number of each array."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(a.reshape(b.shape) - b).max() / np.abs(b).max()) for a, b in pairs)


def training(report):
    params, x, y = problem()
    structure = gmn_lopt.analyze(loss_fn, params, x, y)
    for name, modes in RUNS.items():
        tx = gmn_lopt.load(name, structure)
        one = loop(jax.jit(partial(step, tx)), params, tx.init(params), x, y)
        for mode in modes:
            first, *others = replicas(MODES[mode](tx, params, x, y))
            equal = all(a.tobytes() == b.tobytes() for other in others for a, b in zip(first, other, strict=True))
            error = max(float(np.abs(a.reshape(b.shape) - b).max()) for a, b in zip(first, jax.tree.leaves(one)))
            report(f"{name}, {mode}", error=error, equal=equal)


def tokens_loss(params, ids, y):
    """Lookups of tokens, and of positions, which do not come from the batch; a loop, and a region done again."""
    h = params["tokens"][ids] + params["positions"][jnp.arange(ids.shape[1])]
    block = jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w), None))
    h, _ = jax.lax.scan(block, h, params["blocks"])
    return jnp.mean((h.mean(1) @ params["out"] - y) ** 2)


def tokens_problem():
    rng = np.random.default_rng(0)
    shapes = {"tokens": (7, 4), "positions": (3, 4), "blocks": (2, 4, 4), "out": (4, 2)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    ids, y = rng.integers(0, 7, (16, 3)), rng.normal(size=(16, 2))
    return params, jnp.asarray(ids), jnp.asarray(y, jnp.float32)


def gradients(report):
    """Factors of a shard give its own dense gradient, gathered ones the batch's."""
    params, ids, y = tokens_problem()
    structure = gmn_lopt.analyze(tokens_loss, params, ids, y)
    of_shard = gmn_lopt.analyze(tokens_loss, params, ids[:2], y[:2])
    dense = jax.grad(tokens_loss)(params, ids, y)
    of_shards = [jax.grad(tokens_loss)(params, ids[i : i + 2], y[i : i + 2]) for i in range(0, 16, 2)]
    _, _, factors = gmn_lopt.value_grad_and_factors(tokens_loss)(params, ids, y)
    tx = gmn_lopt.load("default", structure)
    updates, _ = jax.jit(tx.update)(dense, tx.init(params), params, factors=factors)

    def compute(mean, vary, params, ids, y):
        loss = (lambda *args: jax.lax.pmean(tokens_loss(*args), "data")) if mean else tokens_loss
        own = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params) if vary else params
        _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(own, ids, y)
        inside = gmn_lopt.analyze(loss, own, ids, y)
        rebuilt = of_shard.reconstruct(factors), inside.reconstruct(factors)
        gathered = gmn_lopt.gather_factors(factors, "data")
        return jax.lax.pmean(grads, "data"), gathered, jax.tree.map(lambda g: g[None], rebuilt)

    def check(mode, grads, gathered, rebuilt, factor=1.0):
        mean = jax.tree.map(lambda g: g.mean(0), rebuilt)
        found = {"grads": distance(jax.tree.map(lambda g: g / factor, grads), dense)}
        found |= {"factors": distance(gathered, factors), "gathered": distance(structure.reconstruct(gathered), dense)}
        found |= {"mean of shards": max(distance(m, dense) for m in mean)}
        report(mode, **found)

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P(), P(), P("data"))}
    for mean, vary, check_vma in [
        (True, False, True),
        (False, False, True),
        (False, True, True),
        (False, False, False),
    ]:
        mapped = jax.shard_map(partial(compute, mean, vary), mesh=AUTO, check_vma=check_vma, **specs)
        results = jax.jit(mapped)(params, ids, y)
        # shard_map sums the gradients of local losses in shared parameters, and pmean leaves that as it is.
        check(f"{mean=}, {vary=}, {check_vma=}", *results, DEVICES if check_vma and not (mean or vary) else 1.0)
        if vary:
            each = [jax.tree.map(lambda g: g[i], results[2][0]) for i in range(DEVICES)]  # noqa: B023
            report("shards, own parameters", each=max(map(distance, each, of_shards)))
    mapped = jax.pmap(partial(compute, False, False), "data", in_axes=(None, 0, 0), out_axes=(None, None, 0))
    grads, gathered, rebuilt = mapped(params, ids.reshape(8, 2, 3), y.reshape(8, 2, 2))
    check("pmap", grads, gathered, jax.tree.map(lambda g: g[:, 0], rebuilt))

    def update(params, state, factors):
        return tx.update(dense, state, params, factors=gmn_lopt.gather_factors(factors, "data"))[0]

    # Factors of the whole batch vary over no axis, and stay as they are.
    shared = jax.jit(jax.shard_map(update, mesh=AUTO, in_specs=P(), out_specs=P()))(params, tx.init(params), gathered)
    report("update", whole=distance(shared, updates))


def checkpoints(report):
    """A run that is saved and restored by Orbax goes on as if nothing had been, and on other devices, too."""
    params, x, y = problem()
    structure = gmn_lopt.analyze(loss_fn, params, x, y)
    learned = gmn_lopt.load("default", structure)
    halves = [(x[i::2], y[i::2]) for i in range(2)]

    def train(tx, state, mesh):
        compiled, split, middle = jax.jit(partial(step, tx)), NamedSharding(mesh, P("data")), None
        while state["step"] < STEPS:
            half = jax.device_put(halves[state["step"] % 2], split)
            new = compiled(state["params"], state["optimizer"], *half)
            state = {"params": new[0], "optimizer": new[1], "step": state["step"] + 1}
            if state["step"] == STEPS // 2 + 1:  # in the middle of an accumulation
                middle = state
        return middle, state

    for name, tx in {"default": learned, "multi_steps": gmn_lopt.multi_steps(learned, 2, structure)}.items():
        placed = jax.device_put(params, NamedSharding(AUTO, P()))
        middle, whole = train(tx, {"params": placed, "optimizer": jax.jit(tx.init)(placed), "step": 0}, AUTO)
        with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(folder) / "checkpoint", middle)
            checkpointer.wait_until_finished()
            for devices in (8, 4, 1):
                mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
                # Nothing of the run that was saved: only shapes, and where arrays shall be.
                shapes = jax.eval_shape(lambda: {"params": params, "optimizer": tx.init(params)})  # noqa: B023
                everywhere = NamedSharding(mesh, P())
                like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), shapes)  # noqa: B023
                restored = checkpointer.restore(Path(folder) / "checkpoint", like | {"step": 0})
                same = all(map(np.array_equal, jax.tree.leaves(restored), jax.tree.leaves(middle)))
                _, ended = train(tx, restored, mesh)
                ended, expected = (jax.device_get(state) for state in (ended, whole))
                equal = all(map(np.array_equal, jax.tree.leaves(ended), jax.tree.leaves(expected)))
                error = distance(ended["params"], expected["params"])
                report(f"{name}, {devices} devices", same=same, equal=equal, error=error)


if __name__ == "__main__":
    assert len(jax.devices()) == DEVICES
    {"training": training, "gradients": gradients, "checkpoints": checkpoints}[sys.argv[1]](
        lambda name, **found: print(json.dumps({"name": name, **found}), flush=True)
    )
