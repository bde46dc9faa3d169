"""A 64-32-10 ReLU network on Fashion-MNIST downsized to 8x8 pixels."""

from functools import partial

from gmn_lopt.tasks.data.images import FASHION_MNIST
from gmn_lopt.tasks.mlp import make_mlp

make = partial(make_mlp, "fashion_mnist_mlp", FASHION_MNIST)
