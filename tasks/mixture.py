"""The mixture that the generalist optimizers are meta-trained on: small tasks that differ in everything.

Data sets, widths from 16 to 256, one to three hidden layers, batches of 32 to 256, inputs in [0, 1] or standardised,
classifiers and autoencoders, four activation functions, initial scales a factor of 3 off either way, horizons of 200 to
5,000 steps; and a transformer on text. Meta-training adds the rest at random (:mod:`gmn_lopt.meta.augmentation`): the
step size and the scale of every tensor.
"""

import functools
from dataclasses import replace
from typing import Any

from gmn_lopt.meta.task import Task
from gmn_lopt.tasks import text_transformer
from gmn_lopt.tasks.data.images import CIFAR10, CIFAR100, FASHION_MNIST
from gmn_lopt.tasks.data.scikit_learn import DIGITS
from gmn_lopt.tasks.mlp import make_mlp

DATASETS = {"digits": DIGITS, "fashion_mnist": FASHION_MNIST, "cifar10": CIFAR10, "cifar100": CIFAR100}


def _mlp(dataset: str, hidden: tuple[int, ...], batch_size: int, horizon: int, **more: Any) -> tuple[str, dict]:
    return dataset, {"hidden": hidden, "batch_size": batch_size, "horizon": horizon, **more}


# Every horizon is a multiple of 25 and of 50, lengths of truncations that meta-training uses. Wide models have short
# horizons: they would take most of the time otherwise.
MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    _mlp("digits", (32,), 128, 500),
    _mlp("digits", (24, 24, 24), 64, 1000, activation="tanh", standardise=True),
    _mlp("digits", (16,), 32, 1000, activation="gelu", autoencode=True),
    _mlp("fashion_mnist", (32,), 128, 2000),
    _mlp("fashion_mnist", (64, 32), 64, 1000, activation="gelu", standardise=True, init_scale=1 / 3),
    _mlp("fashion_mnist", (16, 16), 256, 5000, activation="tanh", init_scale=3.0),
    _mlp("fashion_mnist", (48,), 128, 500, activation="silu", standardise=True, autoencode=True),
    _mlp("cifar10", (32,), 128, 2000),
    _mlp("cifar10", (64, 64), 32, 500, activation="silu", standardise=True),
    _mlp("cifar10", (16, 16, 16), 64, 1000, init_scale=3.0),
    _mlp("cifar10", (32, 16), 128, 200, activation="tanh", autoencode=True),
    _mlp("cifar100", (64,), 128, 1000),
    _mlp("cifar100", (256,), 64, 200, activation="gelu", standardise=True, init_scale=1 / 3),
)
TEXT_HORIZON = 2000


def make_all(data_dir: str | None = None) -> tuple[Task, ...]:
    """All tasks of the mixture; raises as :func:`gmn_lopt.tasks.data.images.load_images` where data are not there."""
    # Each data set is read once, and its arrays are shared.
    shared = {name: replace(dataset, load=functools.cache(dataset.load)) for name, dataset in DATASETS.items()}
    models = enumerate(MODELS)
    mlps = tuple(make_mlp(f"{name}-{i}", shared[name], data_dir, **settings) for i, (name, settings) in models)
    return (*mlps, text_transformer.make(horizon=TEXT_HORIZON))
