"""A 192-32-10 ReLU network on CIFAR-10 downsized to 8x8 pixels."""

from functools import partial

from gmn_lopt.tasks.data.images import CIFAR10
from gmn_lopt.tasks.mlp import make_mlp

make = partial(make_mlp, "cifar10_mlp", CIFAR10)
