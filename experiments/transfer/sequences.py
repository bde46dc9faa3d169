"""Models of the Python language reference, by characters: an LSTM, and a transformer of a million weights."""

import math
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from gmn_lopt.meta import Task
from gmn_lopt.tasks.data import batches
from gmn_lopt.tasks.data.text import language_data
from gmn_lopt.tasks.text_transformer import VOCABULARY, load
from gmn_lopt.tasks.transformer import Transformer, language_task


class LSTM(nn.Module):
    """Embeddings, one recurrent layer, logits."""

    width: int = 48

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length vocabulary"]:
        """The logits of the next character."""
        x = nn.Embed(VOCABULARY, self.width)(tokens)
        return nn.Dense(VOCABULARY)(nn.RNN(nn.OptimizedLSTMCell(self.width))(x))


def lstm(data_dir: str | None = None, *, horizon: int = 300, batch_size: int = 16, length: int = 24) -> Task:
    """An LSTM of 31,000 parameters."""
    model, tokens = LSTM(), load()

    def init(key: jax.Array) -> PyTree:
        return model.init(key, jnp.zeros((1, length), int))["params"]

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        logits: Any = model.apply({"params": params}, batch["input"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"]).mean()

    data = language_data(tokens["train"], tokens["test"], length, 300)
    cap, subset = 1.5 * math.log(VOCABULARY), f"{len(data['test']['input'])} sequences of {length} characters"
    return Task("lstm", horizon, batch_size, cap, data, init, loss, batches(batch_size), subset)


def language_model(data_dir: str | None = None, *, horizon: int = 200, batch_size: int = 8) -> Task:
    """A transformer of 1.0 million parameters: five blocks of width 128, 32 characters, 256 of them a step."""
    model = Transformer(VOCABULARY, length=32, width=128, heads=4, feed_forward=512, blocks=5)
    return replace(language_task("language_model", model, load, batch_size, horizon, 200, "characters"), at_once=50)
