"""A regression, a factorisation of a matrix, and a graph network."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from gmn_lopt.meta import Task
from gmn_lopt.tasks.data import Dataset, batches
from gmn_lopt.tasks.data.scikit_learn import DIGITS
from gmn_lopt.tasks.mlp import make_mlp


def regression(data_dir: str | None = None, *, horizon: int = 500, batch_size: int = 32) -> Task:
    """Friedman's first problem (1991): five of ten inputs matter, with noise of standard deviation 1."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(4000, 10)).astype(np.float32)
    y = 10 * np.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = ((y + rng.standard_normal(len(y)) - 14.4) / 4.9).astype(np.float32)  # its mean and deviation
    cut = {"train": slice(0, 2000), "valid": slice(2000, 3000), "test": slice(3000, 4000)}
    data = {name: {"row": x[part], "target": y[part]} for name, part in cut.items()}
    table = Dataset(lambda data_dir: data, None)
    return make_mlp("regression", table, hidden=(64, 64), batch_size=batch_size, horizon=horizon, activation="silu")


def matrix_factorisation(data_dir: str | None = None, *, horizon: int = 500, batch_size: int = 256) -> Task:
    """Ratings of 200 items by 300 users, of rank 5 with noise of 0.3, a fifth of them known; factors of rank 8."""
    users, items, rank, width = 300, 200, 5, 8
    rng = np.random.default_rng(0)
    ratings = rng.standard_normal((users, rank)) @ rng.standard_normal((rank, items)) / math.sqrt(rank)
    ratings += rng.standard_normal(users)[:, None] + 0.3 * rng.standard_normal((users, items))
    chosen = rng.permutation(users * items)
    cut = {"train": slice(0, 12000), "valid": slice(12000, 14000), "test": slice(14000, 16000)}
    data = {
        name: {
            "user": (chosen[part] // items).astype(np.int32),
            "item": (chosen[part] % items).astype(np.int32),
            "rating": ratings.ravel()[chosen[part]].astype(np.float32),
        }
        for name, part in cut.items()
    }

    def init(key: jax.Array) -> PyTree:
        one, other = jax.random.split(key)
        table = lambda key, rows: 0.3 * jax.random.normal(key, (rows, width))  # noqa: E731
        tables = {"user": table(one, users), "item": table(other, items)}
        return tables | {"user_bias": jnp.zeros((users, 1)), "item_bias": jnp.zeros((items, 1))}

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        product = jnp.sum(params["user"][batch["user"]] * params["item"][batch["item"]], axis=1)
        biases = params["user_bias"][batch["user"], 0] + params["item_bias"][batch["item"], 0]
        return jnp.mean((product + biases - batch["rating"]) ** 2)

    variance = float(np.var(data["train"]["rating"]))
    return Task("matrix_factorisation", horizon, batch_size, 3 * variance, data, init, loss, batches(batch_size))


class GCN(nn.Module):
    """Two graph convolutions (Kipf and Welling 2017)."""

    graph: Any  # [nodes, nodes], normalised
    width: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "nodes inputs"]) -> Float[Array, "nodes classes"]:
        """The logits of all nodes."""
        x = nn.relu(self.graph @ nn.Dense(self.width)(x))
        x = nn.relu(self.graph @ nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def graph_network(data_dir: str | None = None, *, horizon: int = 300, batch_size: int = 64) -> Task:
    """Which digit an image is, from the graph of its five nearest neighbours; its pixels are noisy.

    All nodes are computed at each step, and the loss is that of a batch of them.
    """
    splits = DIGITS.load(None)
    images = np.concatenate([splits[name]["image"] for name in ("train", "valid", "test")])[:1000]
    labels = np.concatenate([splits[name]["label"] for name in ("train", "valid", "test")])[:1000]
    distances = ((images[:, None] - images) ** 2).sum(2)
    nearest = np.argsort(distances, axis=1)[:, :6]  # itself among them
    adjacency = np.zeros((len(images), len(images)), np.float32)
    np.put_along_axis(adjacency, nearest, 1.0, axis=1)
    adjacency = np.maximum(adjacency, adjacency.T)
    degrees = adjacency.sum(1)
    model = GCN(adjacency / np.sqrt(degrees[:, None] * degrees))
    noisy = (images + np.random.default_rng(0).standard_normal(images.shape)).astype(np.float32)

    def init(key: jax.Array) -> PyTree:
        return model.init(key, noisy)["params"]

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        logits: Any = model.apply({"params": params}, jnp.asarray(noisy))
        chosen = logits[batch["node"]]
        return optax.softmax_cross_entropy_with_integer_labels(chosen, batch["label"]).mean()

    nodes = np.arange(len(images), dtype=np.int32)
    cut = {"train": slice(0, 400), "valid": slice(400, 700), "test": slice(700, 1000)}
    data = {name: {"node": nodes[part], "label": labels[part]} for name, part in cut.items()}
    cap = 1.5 * math.log(10)
    return Task("graph_network", horizon, batch_size, cap, data, init, loss, batches(batch_size))
