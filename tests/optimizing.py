"""What the tests of learned optimizers share: small models, lively meta-parameters, recorded training steps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import gmn_lopt
from gmn_lopt import LearnedOptimizer, PaperFeatures, PointwiseMLP, Residual

BATCH = 12


def cross_entropy(logits, labels):
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(labels.shape[0]), labels])


def mlp(*widths, batch=BATCH, seed=0):
    """A ReLU MLP: its loss, parameters and a batch."""
    rng = np.random.default_rng(seed)
    params = [
        {"b": rng.normal(size=n) * 0.1, "w": rng.normal(size=(m, n)) / np.sqrt(m)}
        for m, n in itertools.pairwise(widths)
    ]

    def loss(params, x, labels):
        for i, layer in enumerate(params):
            x = x @ layer["w"] + layer["b"]
            x = jax.nn.relu(x) if i + 1 < len(params) else x
        return cross_entropy(x, labels)

    x, labels = rng.normal(size=(batch, widths[0])), rng.integers(0, widths[-1], batch)
    return loss, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params), (jnp.asarray(x, jnp.float32), labels)


def residual(batch=4, tokens=3, width=6):
    """A residual stream (one space, several sites) read by tokens and, pooled, by examples; blocks; loose leaves."""
    rng = np.random.default_rng(5)
    shapes = {
        "embed": (5, width),
        "up": (width, 8),
        "up_bias": (8,),
        "down": (8, width),
        "blocks": (2, 4, 7),
        "out": (7, 3),
    }
    params = {name: jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for name, s in shapes.items()}
    params |= {
        "split": jnp.asarray(rng.normal(size=(width, 8)) * 0.5, jnp.float32),
        "position": jnp.ones((tokens, width)),
    }
    params |= {"scale": jnp.asarray(rng.normal(size=width) + 1.0, jnp.float32)}

    def loss(params, x, labels):
        stream = x @ params["embed"] + params["position"]
        stream = stream + jnp.tanh(params["scale"] * stream @ params["up"] + params["up_bias"]) @ params["down"]
        heads = jnp.tanh(stream @ params["split"]).reshape(batch, tokens, 2, 4)
        mixed = jnp.einsum("bthd,hdo->bto", heads, params["blocks"])
        return cross_entropy(jnp.tanh(mixed).mean(1) @ params["out"], labels)

    x, labels = rng.normal(size=(batch, tokens, 5)), rng.integers(0, 3, batch)
    return loss, params, (jnp.asarray(x, jnp.float32), labels)


def analyzed(model):
    loss, params, args = model
    return gmn_lopt.analyze(loss, params, *args)


def small(features=None, network=None, gradmetanet=None, **settings):
    """A residual with small networks, in place of those that are not given."""
    return Residual(features or PaperFeatures(), network or PointwiseMLP(8, 3), gradmetanet, **settings)


def lively(lopt, seed=0, beta=1.0):
    """Meta-parameters with nonzero biases, under which the network decides most of the update."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        name = path[-1].key
        if name.startswith("log_"):
            return jnp.log(jnp.float32(beta)) if name == "log_beta" else x
        return x + jnp.asarray(rng.normal(size=x.shape) * 0.2, jnp.float32)

    return jax.tree.map_with_path(leaf, lopt.init(jax.random.key(seed)))


def with_coefficients(phi, **values):
    """Meta-parameters with other coefficients, by name."""

    def leaf(path, x):
        name = path[-1].key.removeprefix("log_")
        return jnp.log(jnp.float32(values[name])) if name in values else x

    return jax.tree.map_with_path(leaf, phi)


def common(phi, template):
    """Of meta-parameters those that a template has."""
    found = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(phi)}
    return jax.tree.map_with_path(lambda path, _: found[jax.tree_util.keystr(path)], template)


def record(model, steps=3, rate=0.3):
    """Parameters, gradients and factors of some steps of gradient descent on noisy batches."""
    loss, params, (x, *rest) = model
    compute = jax.jit(gmn_lopt.value_grad_and_factors(loss))
    recorded = []
    for step in range(steps):
        noisy = x + 0.3 * jax.random.normal(jax.random.key(step), x.shape)
        _, grads, factors = compute(params, noisy, *rest)
        recorded.append((params, grads, factors))
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    return recorded


@functools.partial(jax.jit, static_argnums=0)
def _update(lopt, phi, grads, state, params, factors):
    return optimizer_of(lopt, phi).update(grads, state, params, factors=factors)


def optimizer_of(lopt, phi):
    """The transformation, told of a number of steps if it wants to know."""
    return lopt.optimizer(phi, **({"total_steps": 100} if lopt.wants_total_steps else {}))


def play(lopt: LearnedOptimizer, phi, recorded):
    """The updates that a learned optimizer makes of recorded steps."""
    state, updates = optimizer_of(lopt, phi).init(recorded[0][0]), []
    for params, grads, factors in recorded:
        step, state = _update(lopt, phi, grads, state, params, factors)
        updates.append(step)
    return updates


def relative_difference(tree, reference):
    """The largest difference of any tensor, relative to the largest entry of that tensor in the reference."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    return max(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max() for a, b in pairs)
