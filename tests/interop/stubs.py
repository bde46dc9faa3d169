"""What learned_optimization looks like from outside, without it: the methods that its tasks and optimizers have."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import flax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

SIDE, CLASSES, WORDS, LENGTH = 6, 3, 7, 5


class Datasets:
    """Four iterators of batches that never end, shuffled by NumPy's own generator as theirs are."""

    def __init__(self, examples, batch_size=8, abstract_batch=None, length=None):
        self.examples, self.batch_size, self.length = examples, batch_size, length
        self.abstract_batch = abstract_batch or jax.tree.map(self._abstract, examples)
        self.extra_info = {"num_classes": CLASSES, "vocab_size": WORDS}

    def _abstract(self, x):
        return jax.ShapeDtypeStruct((self.batch_size, *x.shape[1:]), x.dtype)

    def split(self, name):
        part = {"train": 0, "inner_valid": 1, "outer_valid": 2, "test": 3}[name]
        quarter = len(jax.tree.leaves(self.examples)[0]) // 4
        examples = jax.tree.map(lambda x: x[part * quarter : (part + 1) * quarter], self.examples)
        return self._batches(examples, quarter)

    @property
    def train(self):
        return self.split("train")

    def _batches(self, examples, count):
        given = 0
        while True:
            order = np.random.permutation(count)
            for i in range(0, count - self.batch_size + 1, self.batch_size):
                if given == self.length:
                    return
                given += 1
                chosen = order[i : i + self.batch_size]
                yield jax.tree.map(lambda x, chosen=chosen: x[chosen], examples)


def images(batch_size=8, **more):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(160, SIDE, SIDE, 1)).astype(np.float32)
    return Datasets({"image": image, "label": rng.integers(0, CLASSES, 160).astype(np.int32)}, batch_size, **more)


def text():
    tokens = np.random.default_rng(1).integers(0, WORDS, (160, LENGTH + 1)).astype(np.int32)
    return Datasets({"obs": tokens[:, :-1], "target": tokens[:, 1:]})


class Task:
    datasets: Any = None

    def init_with_state(self, key):
        return self.init(key), None

    def loss_with_state(self, params, state, key, data):
        assert state is None
        return self.loss(params, key, data), None

    def normalizer(self, loss):
        return loss

    @property
    def name(self):
        return type(self).__name__


class HaikuTask(Task):
    """A task whose network is a Haiku function of a batch, its loss; random keys and a state as theirs have them."""

    def __init__(self, function, datasets, bound=None):
        self.datasets, self.bound = datasets, bound
        self.module = hk.transform_with_state(function)

    def init_with_state(self, key):
        batch = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), self.datasets.abstract_batch)
        return self.module.init(key, batch)

    def init(self, key):
        return self.init_with_state(key)[0]

    def loss_with_state(self, params, state, key, data):
        return self.module.apply(params, state, key, data)

    def loss(self, params, key, data):
        return self.loss_with_state(params, {}, key, data)[0]

    def normalizer(self, loss):
        return loss if self.bound is None else jnp.clip(loss, 0, self.bound)


def cross_entropy(logits, labels):
    return -jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, logits.shape[-1]), axis=-1)


def MLP(hidden=(8,), dropout=0.0, batch_size=8):
    def function(batch):
        net = hk.Flatten()(batch["image"])
        net = hk.nets.MLP([*hidden, CLASSES])(net, dropout_rate=dropout, rng=hk.next_rng_key())
        return cross_entropy(net, batch["label"]).mean()

    hidden = (hidden,) if isinstance(hidden, int) else hidden
    return HaikuTask(function, images(batch_size), bound=1.5 * np.log(CLASSES))


def Conv():
    """With batch normalisation, whose averages the loss does not read."""

    def function(batch):
        net = hk.Conv2D(4, 3, stride=2)(batch["image"])
        net = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(net, is_training=True))
        return cross_entropy(hk.Linear(CLASSES)(net.mean((1, 2))), batch["label"]).mean()

    return HaikuTask(function, images(), bound=1.5 * np.log(CLASSES))


def Warmed():
    """With a state that the loss reads."""

    def function(batch):
        count = hk.get_state("count", (), init=jnp.zeros)
        hk.set_state("count", count + 1)
        return jnp.mean(hk.Linear(1)(hk.Flatten()(batch["image"])) ** 2) / (1 + count)

    return HaikuTask(function, images())


def Autoencoder():
    def function(batch):
        net = hk.Flatten()(batch["image"])
        return jnp.mean(jnp.square(net - jax.nn.sigmoid(hk.nets.MLP([4, net.shape[-1]])(net))))

    return HaikuTask(function, images())


def RNN():
    def function(batch):
        core, embedded = hk.LSTM(6), hk.Embed(WORDS, 4)(batch["obs"])
        out, _ = hk.dynamic_unroll(core, embedded, core.initial_state(len(embedded)), time_major=False)
        mask = batch["obs"] != 0
        return jnp.sum(cross_entropy(hk.Linear(WORDS)(out), batch["target"]) * mask) / jnp.sum(mask)

    return HaikuTask(function, text(), bound=1.5 * np.log(WORDS))


class Quadratic(Task):
    """Without data; the key draws what is added to the loss."""

    def __init__(self, dim=5, noise=0.0):
        self.dim, self.noise = dim, noise

    def init(self, key):
        return jax.random.normal(key, (self.dim,))

    def loss(self, params, key, data):
        return jnp.sum(params**2) + self.noise * jax.random.normal(key)


class Family:
    """Quadratics around a target that is drawn."""

    datasets = None
    name = "Family"

    def sample(self, key):
        return jax.random.normal(key, (5,))

    def task_fn(self, target):
        return SimpleNamespace(
            init=lambda key: jax.random.normal(key, (5,)),
            loss=lambda params, key, data: jnp.sum((params - target) ** 2),
        )


QUADRATIC, NUMBER = Quadratic(), 7


class Counting(Quadratic):
    """Its state counts the losses that were taken, and its loss reads it."""

    def init_with_state(self, key):
        return self.init(key), jnp.zeros(())

    def loss_with_state(self, params, state, key, data):
        return (1 + state) * self.loss(params, key, data), state + 1


def no_common_axis():
    task = Quadratic()
    task.datasets = SimpleNamespace(split=lambda name: iter([{"x": np.ones((8, 2)), "y": np.ones(6)}] * 1000))
    return task


def scalars():
    task = Quadratic()
    task.datasets = SimpleNamespace(split=lambda name: iter([np.float32(1)] * 1000))
    return task


def other_batch():
    image, label = jax.ShapeDtypeStruct((8, 9, 9, 1), np.float32), jax.ShapeDtypeStruct((8,), np.int32)
    task = MLP()
    task.datasets.abstract_batch = {"image": image, "label": label}
    return task


def different_sizes():
    task = Quadratic()
    sizes = {"train": 8, "outer_valid": 8, "test": 6}
    task.datasets = SimpleNamespace(split=lambda name: iter([np.ones((sizes[name], 2))] * 1000))
    return task


def short():
    task = MLP()
    task.datasets.length = 3
    return task


def broken():
    raise RuntimeError("no such data\nand more lines")


class OptaxState(NamedTuple):
    params: Any
    state: Any
    optax_opt_state: Any
    iteration: Any


class OptaxOptimizer:
    def __init__(self, opt):
        self.opt = opt

    def init(self, params, model_state=None, num_steps=None, key=None):
        return OptaxState(params, model_state, self.opt.init(params), 0)

    def get_params(self, state):
        return state.params

    def set_params(self, state, params):
        return state._replace(params=params)

    def update(self, opt_state, grad, loss, model_state=None, key=None, **kwargs):
        updates, new = self.opt.update(grad, opt_state.optax_opt_state, opt_state.params)
        params = optax.apply_updates(opt_state.params, updates)
        return OptaxState(params, model_state, new, opt_state.iteration + 1)


def SGD(learning_rate=0.01):
    return OptaxOptimizer(optax.sgd(learning_rate))


def Adam(learning_rate=0.01):
    return OptaxOptimizer(optax.adam(learning_rate))


@flax.struct.dataclass
class ScaledState:
    params: Any
    left: Any
    losses: Any


class Scaled:
    """A learned optimizer: SGD with a step size that falls to zero over the steps, for each parameter its own."""

    def init(self, key):
        return {"net": {"rate": jnp.full((1,), 0.5)}, "list": [jnp.float32(1.0), jnp.ones(2)]}

    def opt_fn(self, theta, is_training=False):
        class Opt:
            def init(self, params, model_state=None, num_steps=None, key=None):
                if num_steps is None:
                    raise ValueError("must know the number of steps")
                return ScaledState(params, jnp.float32(num_steps), jnp.zeros(()))

            def get_params(self, state):
                return state.params

            def set_params(self, state, params):  # as version 0.0.1 has it, for named tuples
                return state._replace(params=params)

            def update(self, opt_state, grad, loss, model_state=None, key=None):
                rate = theta["net"]["rate"][0] * theta["list"][0] * opt_state.left / 10
                params = jax.tree.map(lambda p, g: p - rate * g, opt_state.params, grad)
                return ScaledState(params, opt_state.left - 1, opt_state.losses + loss)

        return Opt()


class Stubborn(OptaxOptimizer):
    def __init__(self):
        super().__init__(optax.sgd(0.1))

    def init(self, params, model_state=None, num_steps=None, key=None):
        return (params, self.opt.init(params))


class VectorizedTruncatedStep:
    """As their class of this name: many of one step, by ``vmap``; meta-parameters may be stacked."""

    def __init__(self, step, num_tasks):
        self.step, self.num_tasks = step, num_tasks

    def init_step_state(self, theta, outer_state, key, theta_is_vector=False):
        axes = (0 if theta_is_vector else None, None, 0)
        return jax.vmap(self.step.init_step_state, axes)(theta, outer_state, jax.random.split(key, self.num_tasks))

    def unroll_step(self, theta, state, key, data, outer_state, theta_is_vector=False):
        axes = (0 if theta_is_vector else None, 0, 0, 0, None)
        keys = jax.random.split(key, self.num_tasks)
        return jax.vmap(self.step.unroll_step, axes)(theta, state, keys, data, outer_state)
