"""Small convolutional networks in every JAX model library, for tests: ``name -> (loss_fn, params, args)``."""

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
from convolutions import BATCH, images
from flax import nnx
from models import OUTPUTS, cross_entropy

WIDTH = 6


def batch(*shape):
    return images(BATCH, *shape), jnp.arange(BATCH) % OUTPUTS


class LinenBlock(linen.Module):
    """A block of a ResNet; the first one of a stage halves the image."""

    width: int
    stride: int = 1

    @linen.compact
    def __call__(self, x, train):
        norm = lambda: linen.BatchNorm(use_running_average=not train)  # noqa: E731
        y = linen.relu(norm()(linen.Conv(self.width, (3, 3), (self.stride,) * 2, use_bias=False)(x)))
        y = norm()(linen.Conv(self.width, (3, 3), use_bias=False)(y))
        if self.stride > 1:
            x = norm()(linen.Conv(self.width, (1, 1), (self.stride,) * 2, use_bias=False)(x))
        return linen.relu(x + y)


def linen_resnet():
    class ResNet(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.BatchNorm(use_running_average=not train)(linen.Conv(WIDTH, (3, 3))(x))
            x = linen.max_pool(linen.relu(x), (2, 2), (2, 2))
            x = LinenBlock(2 * WIDTH, 2)(LinenBlock(WIDTH)(x, train), train)
            return linen.Dense(OUTPUTS)(linen.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1))

    model = ResNet()
    x, labels = batch(8, 8, 3)
    variables = model.init(jax.random.key(0), x, True)

    def loss(params, state, x, labels):
        logits, state = model.apply({"params": params} | state, x, True, mutable=["batch_stats"])
        return cross_entropy(logits, labels)

    return loss, variables["params"], ({"batch_stats": variables["batch_stats"]}, x, labels)


def nnx_resnet():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = (
                nnx.Conv(WIDTH, WIDTH, (3, 3), use_bias=False, padding="CIRCULAR", rngs=rngs) for _ in range(2)
            )
            self.norms = nnx.List([nnx.BatchNorm(WIDTH, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            return nnx.relu(x + self.norms[1](self.second(nnx.relu(self.norms[0](self.first(x))))))

    class ResNet(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, WIDTH, (3, 3), (2, 2), rngs=rngs)
            self.block = Block(rngs)
            self.last = nnx.Linear(WIDTH, OUTPUTS, rngs=rngs)

        def __call__(self, x):
            return self.last(self.block(nnx.relu(self.stem(x))).mean((1, 2)))

    graph, params, state = nnx.split(ResNet(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, state, x, labels):
        state = jax.tree.map(jnp.asarray, state)  # variables of its own, which it may change
        return cross_entropy(nnx.merge(graph, params, state)(x), labels)

    return loss, params, (state, *batch(8, 8, 3))


def haiku_resnet():
    def forward(x):
        norm = lambda x: hk.BatchNorm(True, True, 0.9, data_format="NC...")(x, is_training=True)  # noqa: E731
        conv = lambda x, *options, **named: hk.Conv2D(WIDTH, 3, *options, data_format="NCHW", **named)(x)  # noqa: E731
        x = jax.nn.relu(norm(conv(x, 2)))
        x = jax.nn.relu(x + norm(conv(jax.nn.relu(conv(x)), with_bias=False)))
        x = hk.avg_pool(x, (1, 1, 2, 2), (1, 1, 2, 2), "SAME")
        return hk.Linear(OUTPUTS)(hk.Flatten()(x))

    model = hk.without_apply_rng(hk.transform_with_state(forward))
    x, labels = batch(3, 8, 8)
    params, state = model.init(jax.random.key(0), x)

    def loss(params, x, labels):
        return cross_entropy(model.apply(params, state, x)[0], labels)

    return loss, params, (x, labels)


def equinox_resnet():
    class ResNet(eqx.Module):
        stem: eqx.nn.Conv2d
        first: eqx.nn.Conv2d
        second: eqx.nn.Conv2d
        norms: list
        last: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.stem = eqx.nn.Conv2d(3, WIDTH, 3, 2, padding=1, key=keys[0])
            self.first = eqx.nn.Conv2d(WIDTH, WIDTH, 3, padding=1, key=keys[1])
            self.second = eqx.nn.Conv2d(WIDTH, WIDTH, 3, padding=1, use_bias=False, key=keys[2])
            self.norms = [eqx.nn.BatchNorm(WIDTH, axis_name="batch", mode="batch") for _ in range(2)]
            self.last = eqx.nn.Linear(WIDTH, OUTPUTS, key=keys[3])

        def __call__(self, x, state):
            x = jax.nn.relu(self.stem(x))
            y, state = self.norms[0](self.first(x), state)
            y, state = self.norms[1](self.second(jax.nn.relu(y)), state)
            x = eqx.nn.MaxPool2d(2, 2)(jax.nn.relu(x + y))
            return self.last(x.mean((1, 2))), state

    model, state = eqx.nn.make_with_state(ResNet)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x, labels):
        model = eqx.combine(params, static)
        logits, _ = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return cross_entropy(logits, labels)

    return loss, params, batch(3, 8, 8)


def mobilenet():
    """An inverted residual: expand, depthwise, squeeze and excite, project."""

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            wide = 2 * WIDTH
            x = linen.Conv(WIDTH, (3, 3), (2, 2))(x)
            y = linen.relu6(linen.Conv(wide, (1, 1))(x))
            y = linen.relu6(linen.Conv(wide, (3, 3), feature_group_count=wide)(y))
            gate = linen.Conv(wide, (1, 1))(linen.relu(linen.Conv(4, (1, 1))(y.mean((1, 2), keepdims=True))))
            y = linen.Conv(WIDTH, (1, 1))(y * linen.sigmoid(gate))
            return linen.Dense(OUTPUTS)((x + y).mean((1, 2)))

    return linen_model(Block(), 8, 8, 3)


def vision_transformer():
    """The stem of a ViT, or of CLIP: patches, a class token, positions; then attention."""

    class Stem(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(2 * WIDTH, (4, 4), (4, 4), padding="VALID", use_bias=False)(x)
            x = x.reshape(len(x), -1, 2 * WIDTH)
            position = self.param("position", linen.initializers.normal(), (1, x.shape[1], x.shape[2]))
            x = linen.LayerNorm()(x + position)
            x = x + linen.MultiHeadDotProductAttention(2)(x)
            return linen.Dense(OUTPUTS)(x.mean(1))

    return linen_model(Stem(), 8, 8, 3)


def wav2vec():
    """A waveform through strided 1-D convolutions, group normalisation, and a grouped convolution for positions."""

    class Stem(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.gelu(linen.GroupNorm(num_groups=None, group_size=1)(linen.Conv(WIDTH, (10,), (5,))(x)))
            x = linen.gelu(linen.Conv(WIDTH, (3,), (2,), use_bias=False)(x))
            x = linen.Dense(2 * WIDTH)(linen.LayerNorm()(x))
            x = x + linen.gelu(linen.Conv(2 * WIDTH, (4,), feature_group_count=2)(x))
            return linen.Dense(OUTPUTS)(linen.relu(linen.Dense(WIDTH)(x)).mean(1))

    return linen_model(Stem(), 60, 1)


def linen_model(model, *shape):
    x, labels = batch(*shape)
    params = model.init(jax.random.key(0), x)
    return lambda params, x, labels: cross_entropy(model.apply(params, x), labels), params, (x, labels)


NETWORKS = {
    "linen ResNet": linen_resnet,
    "nnx ResNet": nnx_resnet,
    "haiku ResNet": haiku_resnet,
    "equinox ResNet": equinox_resnet,
    "MobileNet": mobilenet,
    "ViT": vision_transformer,
    "Wav2Vec2": wav2vec,
}
