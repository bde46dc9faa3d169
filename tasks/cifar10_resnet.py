"""A ResNet of eight layers (He et al. 2016, arXiv:1512.03385) on CIFAR-10 downsized to 16x16 pixels."""

import flax.linen as nn
from jaxtyping import Array, Float

from gmn_lopt.meta.task import Task
from gmn_lopt.tasks.cnn import BatchNorm, make_cnn
from gmn_lopt.tasks.data.images import LARGE_CIFAR10


class Block(nn.Module):
    """Two convolutions beside a shortcut, which is one of 1x1 where the shape changes."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"]) -> Float[Array, "batch new_h new_w new_channels"]:
        """The block's output."""
        strides = (self.stride, self.stride)
        y = nn.relu(BatchNorm()(nn.Conv(self.width, (3, 3), strides, use_bias=False)(x)))
        y = BatchNorm()(nn.Conv(self.width, (3, 3), use_bias=False)(y))
        if self.stride > 1 or x.shape[-1] != self.width:
            x = BatchNorm()(nn.Conv(self.width, (1, 1), strides, use_bias=False)(x))
        return nn.relu(x + y)


class Model(nn.Module):
    """A stage of one block for each multiple of the width; each but the first halves the image."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width 3"]) -> Float[Array, "batch 10"]:
        """The logits."""
        x = nn.relu(BatchNorm()(nn.Conv(self.width, (3, 3), use_bias=False)(2 * x - 1)))
        for stage in range(3):
            x = Block(self.width * 2**stage, 1 if stage == 0 else 2)(x)
        logits: Array = nn.Dense(10)(x.mean((1, 2)))
        return logits


def make(data_dir: str | None = None, *, width: int = 16, batch_size: int = 128, horizon: int = 1000) -> Task:
    """The task; ``width`` is the number of channels of the first stage."""
    if width < 1:
        raise ValueError("width must be at least 1")
    return make_cnn("cifar10_resnet", LARGE_CIFAR10, Model(width), data_dir, batch_size=batch_size, horizon=horizon)
