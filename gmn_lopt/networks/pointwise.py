"""The paper's per-parameter network: one perceptron that is applied to every parameter entry by itself."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.networks.initialization import matrix, vector
from gmn_lopt.util.checks import whole


@dataclass(frozen=True)
class PointwiseMLP:
    """A multi-layer perceptron on the channels of each parameter entry (arXiv:2507.01649, section 6: ``DS``).

    Attributes:
        width: width of the hidden layers.
        hidden_layers: number of hidden layers.
        tied: whether the weights belong to the leaves of one model. These do not: they fit any.

    Raises:
        ValueError: a size is impossible.

    Example:
        >>> loss = lambda p, x: jnp.mean(x @ p["w"] + p["b"])
        >>> structure = gmn_lopt.analyze(loss, {"b": jnp.ones(4), "w": jnp.ones((2, 4))}, jnp.ones((3, 2)))
        >>> module = PointwiseMLP(8).module(structure, (0, 1), channels=3, extra_channels=0, time_channels=2, outputs=1)
        >>> arguments = [jnp.ones((4, 3)), jnp.ones((8, 3))], [None, None], jnp.ones(2)
        >>> weights = module.init(jax.random.key(0), *arguments)
        >>> [y.shape for y in module.apply(weights, *arguments)]
        [(4, 1), (8, 1)]
    """

    width: int = 32
    hidden_layers: int = 3
    tied: ClassVar[bool] = False

    def __post_init__(self) -> None:
        whole(self, "width")
        whole(self, "hidden_layers", most=64)

    def module(
        self,
        structure: GradientStructure,
        indices: tuple[int, ...],
        channels: int,
        extra_channels: int,
        time_channels: int,
        outputs: int,
    ) -> "PointwiseModule":
        """The network for some leaves of a model.

        Args:
            structure: that of the model.
            indices: which of its leaves are handled.
            channels: number of channels of each parameter entry.
            extra_channels: number of channels that GradMetaNet adds; 0 without it.
            time_channels: number of channels that all entries share.
            outputs: number of outputs for each entry.
        """
        return PointwiseModule(channels, extra_channels, time_channels, self.width, self.hidden_layers, outputs)


class PointwiseModule(nn.Module):
    """The flax module of :class:`PointwiseMLP` (hidden layers with ReLU).

    Its weights are those of an ordinary perceptron on the concatenated channels
    ``[per-parameter, GradMetaNet, time]``; the concatenation is never built, since the time channels are the same for
    all entries and their share of the first layer is a bias.

    The last layer starts like the others (LeCun normal, **not** scaled down): its output enters the update only through
    the factor ``beta``, which starts small.

    Attributes:
        parameter_channels, extra_channels, time_channels, outputs: as for :meth:`PointwiseMLP.module`.
        width, hidden_layers: as for :class:`PointwiseMLP`.
    """

    parameter_channels: int
    extra_channels: int
    time_channels: int
    width: int
    hidden_layers: int
    outputs: int

    @property
    def last_layer(self) -> str:
        """The name of the weights of the last layer (its bias starts at zero)."""
        return f"kernel_{self.hidden_layers}"

    def setup(self) -> None:  # noqa: D102
        inputs = self.parameter_channels + self.extra_channels + self.time_channels
        sizes = list(itertools.pairwise([inputs] + [self.width] * self.hidden_layers + [self.outputs]))
        self.kernels = [matrix(self, f"kernel_{i}", *size) for i, size in enumerate(sizes)]
        self.biases = [vector(self, f"bias_{i}", columns) for i, (_, columns) in enumerate(sizes)]

    def __call__(
        self,
        features: Sequence[Float[Array, "_ channels"]],
        extra: Sequence[Float[Array, "_ extra"] | None],
        time: Float[Array, "times"],
    ) -> list[Float[Array, "_ outputs"]]:
        """Compute the outputs for each parameter.

        Args:
            features: for each leaf that is handled, the channels of its entries in row-major order.
            extra: for each leaf, GradMetaNet's features of its entries, or None where there are none (they count as
                zero).
            time: the channels that all entries share.

        Returns:
            For each leaf, the outputs for each of its entries.
        """
        first_extra = self.parameter_channels
        first_time = first_extra + self.extra_channels
        kernel = self.kernels[0]
        # All leaves go through one chain of matrix products: most of them are small. Entries lie along the last axis,
        # as the channels come: on a processor that is faster than entries first.
        sizes = [f.shape[0] for f in features]
        bias = time @ kernel[first_time:] + self.biases[0]
        x = kernel[:first_extra].T @ jnp.concatenate([f.T for f in features], axis=1) + bias[:, None]
        if any(e is not None for e in extra):
            zeros = [jnp.zeros((n, self.extra_channels), x.dtype) if e is None else e for n, e in zip(sizes, extra)]
            x = x + kernel[first_extra:first_time].T @ jnp.concatenate(zeros).T
        for kernel, bias in zip(self.kernels[1:], self.biases[1:]):
            x = kernel.T @ jax.nn.relu(x) + bias[:, None]
        return [outputs.T for outputs in jnp.split(x, np.cumsum(sizes)[:-1], axis=1)]
