"""A 192-128-100 ReLU network on CIFAR-100 (fine labels) downsized to 8x8 pixels."""

from functools import partial

from gmn_lopt.tasks.data.images import CIFAR100
from gmn_lopt.tasks.mlp import make_mlp

make = partial(make_mlp, "cifar100_mlp", CIFAR100, hidden=(128,))
