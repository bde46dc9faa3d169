"""A vision transformer, a convolutional network, a contrastive loss and a variational autoencoder, on digits."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from gmn_lopt.meta import Task
from gmn_lopt.tasks.data import batches
from gmn_lopt.tasks.data.scikit_learn import DIGITS

SIDE, CLASSES = 8, 10


class ViT(nn.Module):
    """Patches of 2 by 2 pixels, pre-LayerNorm blocks, the mean over the patches (Dosovitskiy et al. 2021)."""

    width: int = 32
    blocks: int = 2

    @nn.compact
    def __call__(self, images: Float[Array, "batch 8 8 1"]) -> Float[Array, "batch 10"]:
        """The logits."""
        x = nn.Conv(self.width, (2, 2), (2, 2))(images).reshape(len(images), -1, self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(CLASSES)(nn.LayerNorm()(x).mean(1))


class CNN(nn.Module):
    """Three convolutions with group normalisation."""

    width: int = 16

    @nn.compact
    def __call__(self, images: Float[Array, "batch 8 8 1"]) -> Float[Array, "batch 10"]:
        """The logits."""
        x = images
        for i, stride in enumerate((1, 2, 2)):
            x = nn.relu(nn.GroupNorm(4)(nn.Conv(self.width * 2**i, (3, 3), (stride, stride))(x)))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class Encoder(nn.Module):
    """Two hidden layers."""

    outputs: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, "batch outputs"]:
        """The outputs."""
        return nn.Dense(self.outputs)(nn.relu(nn.Dense(64)(nn.relu(nn.Dense(64)(x)))))


def _images(image: Float[Array, "batch 64"]) -> Float[Array, "batch 8 8 1"]:
    return image.reshape(-1, SIDE, SIDE, 1)


def _classifier(name: str, model: nn.Module, horizon: int, batch_size: int) -> Task:
    def init(key: jax.Array) -> PyTree:
        return model.init(key, jnp.zeros((1, SIDE, SIDE, 1)))["params"]

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        logits: Any = model.apply({"params": params}, _images(batch["image"]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    data, sample = DIGITS.load(None), _shifted(batches(batch_size))
    return Task(name, horizon, batch_size, 1.5 * math.log(CLASSES), data, init, loss, sample)


def _shift(key: jax.Array, images: Float[Array, "batch 64"]) -> Float[Array, "batch 64"]:
    """Images moved by up to one pixel either way, each its own way; what leaves on one side is black there anyway."""
    moves = jax.random.randint(key, (len(images), 2), -1, 2)
    moved = jax.vmap(lambda image, move: jnp.roll(image, move, (0, 1)))(images.reshape(-1, SIDE, SIDE), moves)
    return moved.reshape(images.shape)


def _shifted(sample: Callable[[jax.Array, PyTree], PyTree]) -> Callable[[jax.Array, PyTree], PyTree]:
    def augmented(key: jax.Array, split: PyTree) -> PyTree:
        index_key, shift_key = jax.random.split(key)
        batch = sample(index_key, split)
        return batch | {"image": _shift(shift_key, batch["image"])}

    return augmented


def vit(data_dir: str | None = None, *, horizon: int = 300, batch_size: int = 64) -> Task:
    """A vision transformer of 18,000 parameters."""
    return _classifier("vit", ViT(), horizon, batch_size)


def cnn(data_dir: str | None = None, *, horizon: int = 300, batch_size: int = 64) -> Task:
    """A convolutional network of 24,000 parameters."""
    return _classifier("cnn", CNN(), horizon, batch_size)


def contrastive(data_dir: str | None = None, *, horizon: int = 500, batch_size: int = 64) -> Task:
    """SimCLR (Chen et al. 2020): two views of an image are to be nearer to each other than to those of other images.

    The mean over a batch is not one over independent examples: each is in the denominator of all others.
    """
    model, temperature = Encoder(16), 0.2

    def init(key: jax.Array) -> PyTree:
        return model.init(key, jnp.zeros((1, SIDE**2)))["params"]

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        z: Any = model.apply({"params": params}, jnp.concatenate([batch["one"], batch["other"]]))
        z = z / jnp.sqrt(jnp.sum(z**2, axis=1, keepdims=True) + 1e-6)
        similar = z @ z.T / temperature - 1e9 * jnp.eye(len(z))
        partner = jnp.roll(jnp.arange(len(z)), len(batch["one"]))
        return optax.softmax_cross_entropy_with_integer_labels(similar, partner).mean()

    def views(key: jax.Array, image: Float[Array, "batch 64"]) -> PyTree:
        one, other, noise = jax.random.split(key, 3)
        noises = 0.2 * jax.random.normal(noise, (2, *image.shape))
        return {"one": _shift(one, image) + noises[0], "other": _shift(other, image) + noises[1]}

    def sample(key: jax.Array, split: PyTree) -> PyTree:
        index_key, key = jax.random.split(key)
        return batches(batch_size)(index_key, split)

    # The views are drawn once, twenty of each image: the loss has no randomness of its own.
    data = {}
    for i, (name, split) in enumerate(DIGITS.load(None).items()):
        images = jnp.tile(split["image"], (20 if name == "train" else 1, 1))
        drawn = jax.tree.map(np.asarray, views(jax.random.key(i), images))
        data[name] = drawn if name == "train" else jax.tree.map(lambda x: x[:256], drawn)
    return Task("contrastive", horizon, batch_size, 1.5 * math.log(512), data, init, loss, sample)


def autoencoder(data_dir: str | None = None, *, horizon: int = 500, batch_size: int = 64) -> Task:
    """A variational autoencoder with four latent dimensions (Kingma and Welling 2014), in nats for each image."""
    latent = 4
    encoder, decoder = Encoder(2 * latent), Encoder(SIDE**2)

    def init(key: jax.Array) -> PyTree:
        one, other = jax.random.split(key)
        encoded = encoder.init(one, jnp.zeros((1, SIDE**2)))["params"]
        return {"encoder": encoded, "decoder": decoder.init(other, jnp.zeros((1, latent)))["params"]}

    def loss(params: PyTree, batch: PyTree) -> Float[Array, ""]:
        encoded: Any = encoder.apply({"params": params["encoder"]}, batch["image"])
        mean, log_deviation = jnp.split(encoded, 2, axis=1)
        z = mean + jnp.exp(log_deviation) * batch["noise"]
        logits: Any = decoder.apply({"params": params["decoder"]}, z)
        bits = optax.sigmoid_binary_cross_entropy(logits, batch["image"]).sum(1)
        divergence = 0.5 * (jnp.exp(2 * log_deviation) + mean**2 - 1 - 2 * log_deviation).sum(1)
        return jnp.mean(bits + divergence)

    def sample(key: jax.Array, split: PyTree) -> PyTree:
        index_key, noise_key = jax.random.split(key)
        return batches(batch_size)(index_key, split) | {"noise": jax.random.normal(noise_key, (batch_size, latent))}

    rng = np.random.default_rng(0)
    data = {
        name: {"image": split["image"], "noise": rng.standard_normal((len(split["image"]), latent), np.float32)}
        for name, split in DIGITS.load(None).items()
    }
    return Task("autoencoder", horizon, batch_size, 1.5 * SIDE**2 * math.log(2), data, init, loss, sample)
