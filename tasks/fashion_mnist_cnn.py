"""Two convolutions, each with pooling, and a dense layer, on Fashion-MNIST downsized to 16x16 pixels."""

import flax.linen as nn
from jaxtyping import Array, Float

from gmn_lopt.meta.task import Task
from gmn_lopt.tasks.cnn import make_cnn
from gmn_lopt.tasks.data.images import LARGE_FASHION_MNIST


class Model(nn.Module):
    """A convolution of 3x3 for each of the widths, with ReLU and maximum over 2x2, then the logits."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width 1"]) -> Float[Array, "batch 10"]:
        """The logits."""
        for width in self.widths:
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        logits: Array = nn.Dense(10)(x.reshape(len(x), -1))
        return logits


def make(
    data_dir: str | None = None, *, widths: tuple[int, ...] = (16, 32), batch_size: int = 128, horizon: int = 1000
) -> Task:
    """The task; ``widths`` are the channels of the convolutions, at most four of them."""
    if not 1 <= len(widths) <= 4 or min(widths) < 1:
        raise ValueError("widths must be one to four numbers of at least 1")
    model = Model(tuple(widths))
    return make_cnn("fashion_mnist_cnn", LARGE_FASHION_MNIST, model, data_dir, batch_size=batch_size, horizon=horizon)
