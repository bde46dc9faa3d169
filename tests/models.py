"""The same MLP losses in every JAX model library, for tests: ``name -> (loss_fn, params, args)``."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from flax import nnx

BATCH, INPUTS, HIDDEN, OUTPUTS = 12, 7, 6, 5


def data(key=3):
    k1, k2, k3 = jax.random.split(jax.random.key(key), 3)
    return (
        jax.random.normal(k1, (BATCH, INPUTS)),
        jax.random.randint(k2, (BATCH,), 0, OUTPUTS),
        jax.random.normal(k3, (BATCH, 4)),
    )


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def jnp_mlp(activation=jax.nn.relu, widths=(INPUTS, HIDDEN, HIDDEN + 2, OUTPUTS), bias=True):
    def init(key):
        params = []
        for k, d_in, d_out in zip(jax.random.split(key, len(widths)), widths, widths[1:]):
            k1, k2 = jax.random.split(k)
            layer = {"w": jax.random.normal(k1, (d_in, d_out)) / d_in**0.5}
            if bias:
                layer["b"] = 0.1 * jax.random.normal(k2, (d_out,))
            params.append(layer)
        return params

    def loss(params, x, labels):
        h = x
        for i, layer in enumerate(params):
            h = h @ layer["w"] + layer.get("b", 0.0)
            h = activation(h) if i + 1 < len(params) else h
        return cross_entropy(h, labels)

    x, labels, _ = data()
    return loss, init(jax.random.key(0)), (x, labels)


def linen_mlp():
    class MLP(linen.Module):
        @linen.compact
        def __call__(self, x, z, train):
            h = linen.gelu(linen.Dense(HIDDEN)(x) + linen.Dense(HIDDEN, use_bias=False)(z))
            h = h + linen.Dense(HIDDEN)(jnp.tanh(linen.LayerNorm()(h)))
            h = linen.Dropout(0.5, deterministic=not train)(h)
            return linen.Dense(OUTPUTS)(h)

    model = MLP()
    x, labels, z = data()
    params = model.init(jax.random.key(0), x, z, False)

    def loss(params, x, z, labels, train):
        return cross_entropy(model.apply(params, x, z, train), labels)

    return loss, params, (x, z, labels, False)


def nnx_mlp():
    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(INPUTS, HIDDEN, rngs=rngs)
            self.norm = nnx.LayerNorm(HIDDEN, rngs=rngs)
            self.second = nnx.Linear(HIDDEN, OUTPUTS, rngs=rngs)

        def __call__(self, x):
            return self.second(self.norm(nnx.relu(self.first(x))))

    graph, params = nnx.split(MLP(nnx.Rngs(0)), nnx.Param)

    def loss(params, x, labels):
        return cross_entropy(nnx.merge(graph, params)(x), labels)

    x, labels, _ = data()
    return loss, params, (x, labels)


def equinox_mlp():
    model = eqx.nn.MLP(INPUTS, OUTPUTS, HIDDEN, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x, labels):
        return cross_entropy(jax.vmap(eqx.combine(params, static))(x), labels)

    x, labels, _ = data()
    return loss, params, (x, labels)


def haiku_mlp():
    def forward(x):
        h = hk.nets.MLP([HIDDEN, HIDDEN], activation=jnp.tanh)(x)
        h = h + hk.Linear(HIDDEN)(hk.LayerNorm(-1, True, True)(h))
        return hk.Linear(OUTPUTS)(h)

    model = hk.without_apply_rng(hk.transform(forward))
    x, labels, _ = data()
    params = model.init(jax.random.key(0), x)

    def loss(params, x, labels):
        return cross_entropy(model.apply(params, x), labels)

    return loss, params, (x, labels)


def remat_mlp():
    _, params, args = jnp_mlp(jnp.tanh)

    def rematerialised(params, x, labels):
        def hidden(params, x):
            h = jnp.tanh(x @ params[0]["w"] + params[0]["b"])
            return jnp.tanh(h @ params[1]["w"] + params[1]["b"])

        h = jax.checkpoint(hidden)(params, x)
        return cross_entropy(h @ params[2]["w"] + params[2]["b"], labels)

    return rematerialised, params, args


def vmapped_mlp():
    loss, params, (x, labels) = jnp_mlp(jax.nn.gelu)

    def per_example(params, x, labels):
        return jnp.mean(jax.vmap(lambda a, b: loss(params, a[None], b[None]))(x, labels))

    return per_example, params, (x, labels)


def tied_autoencoder():
    key = jax.random.key(5)
    params = {"w": jax.random.normal(key, (INPUTS, HIDDEN)), "b": jnp.ones(HIDDEN), "c": jnp.ones(INPUTS)}

    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["w"].T + params["c"] - x) ** 2)

    return loss, params, data()[:1]


def sequence_model():
    """Tokens before pooling, examples after; an einsum with a per-head kernel; a kernel on the left."""
    key = jax.random.key(5)
    k = jax.random.split(key, 4)
    params = {
        "in": jax.random.normal(k[0], (INPUTS, 2, 3)),
        "head": jax.random.normal(k[1], (2, 3, 3)),
        "out": jax.random.normal(k[2], (6, 4)),
        "last": jax.random.normal(k[3], (OUTPUTS, 4)),
        "bias": jnp.ones((2, 3)),
    }

    def loss(params, x, labels):
        h = jnp.tanh(jnp.einsum("bti,ihk->bthk", x, params["in"]) + params["bias"])
        h = jnp.tanh(jnp.einsum("bthk,hkl->bthl", h, params["head"]))
        h = jnp.tanh(h.reshape(*h.shape[:2], -1) @ params["out"]).mean(1)
        return cross_entropy((params["last"] @ h.T).T, labels)

    x = jax.random.normal(key, (BATCH, 3, INPUTS))
    return loss, params, (x, data()[1])


MODELS: dict[str, Callable[[], tuple[Any, Any, tuple]]] = {
    "jnp relu": jnp_mlp,
    "jnp tanh": lambda: jnp_mlp(jnp.tanh),
    "jnp no bias": lambda: jnp_mlp(jax.nn.gelu, bias=False),
    "jnp one layer": lambda: jnp_mlp(widths=(INPUTS, OUTPUTS)),
    "jnp one neuron": lambda: jnp_mlp(jnp.sin, widths=(INPUTS, 1, OUTPUTS)),
    "flax.linen": linen_mlp,
    "flax.nnx": nnx_mlp,
    "equinox": equinox_mlp,
    "haiku": haiku_mlp,
    "remat": remat_mlp,
    "vmap": vmapped_mlp,
    "tied autoencoder": tied_autoencoder,
    "sequence": sequence_model,
}
