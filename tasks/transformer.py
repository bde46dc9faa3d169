"""A small decoder-only transformer in plain JAX, and the task of predicting the next token with it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from gmn_lopt.meta.task import Task
from gmn_lopt.tasks.data import batches
from gmn_lopt.tasks.data.text import language_data

LOGITS_AT_ONCE = 2**20  # in evaluation, of each run


@dataclass(frozen=True)
class Transformer:
    """Sizes of the model. Every one of them is a setting of the tasks.

    Attributes:
        vocabulary: number of tokens.
        length: tokens in a sequence.
        width: size of the residual stream.
        heads: attention heads; they divide the width.
        feed_forward: hidden units of each feed-forward layer.
        blocks: number of blocks, each attention and feed-forward.
    """

    vocabulary: int
    length: int
    width: int
    heads: int
    feed_forward: int
    blocks: int

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 1:
            raise ValueError(f"{', '.join(vars(self))} must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width: {self.heads} heads, width {self.width}")

    def init(self, key: jax.Array) -> PyTree:
        """Kernels as in the MLP tasks, with standard deviation ``1/sqrt(fan_in)``; tables with ``1/sqrt(width)``."""
        keys = iter(jax.random.split(key, 3 + 6 * self.blocks))

        def dense(inputs: int, outputs: int) -> PyTree:
            # lecun_normal: a truncated normal whose standard deviation, after truncation, is 1/sqrt(fan_in).
            kernel = jax.nn.initializers.lecun_normal()(next(keys), (inputs, outputs))
            return {"kernel": kernel, "bias": jnp.zeros(outputs)}

        def norm() -> PyTree:
            return {"scale": jnp.ones(self.width), "shift": jnp.zeros(self.width)}

        def table(rows: int) -> Float[Array, "rows width"]:
            return jax.random.normal(next(keys), (rows, self.width)) / math.sqrt(self.width)

        params: PyTree = {"token": table(self.vocabulary), "position": table(self.length)}
        for i in range(self.blocks):
            params[f"block_{i}"] = {
                "norm_1": norm(),
                **{name: dense(self.width, self.width) for name in ("query", "key", "value", "attended")},
                "norm_2": norm(),
                "up": dense(self.width, self.feed_forward),
                "down": dense(self.feed_forward, self.width),
            }
        return {**params, "norm": norm(), "output": dense(self.width, self.vocabulary)}

    def logits(
        self, params: PyTree, tokens: Int[Array | np.ndarray, "batch length"]
    ) -> Float[Array, "batch length vocabulary"]:
        """Pre-LayerNorm blocks on a residual stream; each position sees itself and those before it."""
        x = params["token"][tokens] + params["position"]
        for i in range(self.blocks):
            block = params[f"block_{i}"]
            y = _norm(block["norm_1"], x)
            heads = (*y.shape[:2], self.heads, -1)
            query, key, value = (_dense(block[name], y).reshape(heads) for name in ("query", "key", "value"))
            attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
            x = x + _dense(block["attended"], attended.reshape(x.shape))
            y = _norm(block["norm_2"], x)
            x = x + _dense(block["down"], jax.nn.gelu(_dense(block["up"], y)))
        return _dense(params["output"], _norm(params["norm"], x))

    def loss(self, params: PyTree, batch: PyTree) -> Float[Array, ""]:
        """Mean cross-entropy of the next token, in nats."""
        logits = self.logits(params, batch["input"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"]).mean()


def language_task(
    name: str,
    model: Transformer,
    load: Callable[[], Mapping[str, np.ndarray]],
    batch_size: int,
    horizon: int,
    test_sequences: int,
    unit: str = "tokens",
) -> Task:
    """The task of training a transformer on packed sequences.

    Args:
        name: the task's.
        model: the model.
        load: gives the token streams ``"train"`` and ``"test"``, integers ``[tokens]`` each; called once.
        batch_size: sequences per batch, drawn with replacement.
        horizon: number of training steps.
        test_sequences: number of sequences evaluation looks at, evenly spaced over the test split.
        unit: what a token is, in words.

    Raises:
        ValueError: a setting is out of range, or the streams are too short.
    """
    if min(batch_size, horizon, test_sequences) < 1:
        raise ValueError("batch_size, horizon and test_sequences must be at least 1")
    tokens = load()
    data = language_data(tokens["train"], tokens["test"], model.length, test_sequences)

    cap = 1.5 * math.log(model.vocabulary)
    subset = f"{len(data['test']['input'])} sequences of {model.length} {unit}"
    at_once = max(1, LOGITS_AT_ONCE // (model.length * model.vocabulary))
    return Task(name, horizon, batch_size, cap, data, model.init, model.loss, batches(batch_size), subset, at_once)


def _dense(layer: PyTree, x: Float[Array, "*n inputs"]) -> Float[Array, "*n outputs"]:
    return x @ layer["kernel"] + layer["bias"]


def _norm(layer: PyTree, x: Float[Array, "*n width"]) -> Float[Array, "*n width"]:
    return jax.nn.standardize(x, epsilon=1e-5) * layer["scale"] + layer["shift"]
