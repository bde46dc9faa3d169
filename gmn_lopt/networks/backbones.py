"""Backbones: the networks that turn the channels of each parameter into its update."""

import itertools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmn_lopt.factors.structure import Parameter
from gmn_lopt.networks.unf import EquivariantLinear


class DeepSets(nn.Module):
    """``ds``: one multi-layer perceptron applied to every parameter entry by itself (hidden layers with ReLU).

    Its weights are those of an ordinary perceptron on the concatenated channels
    ``[per-parameter, GradMetaNet, time]``; the concatenation is never built, since the time channels are the same for
    all entries and their share of the first layer is a bias.

    The last layer starts like the others (LeCun normal, **not** scaled down): its output enters the update only through
    the factor ``beta``, which starts small.

    Attributes:
        parameter_channels: number of channels of each parameter entry.
        extra_channels: number of channels that GradMetaNet adds; 0 without it.
        time_channels: number of channels that all entries share.
        width: width of the hidden layers.
        hidden_layers: number of hidden layers.
        outputs: number of outputs for each entry.
    """

    parameter_channels: int
    extra_channels: int
    time_channels: int
    width: int = 32
    hidden_layers: int = 3
    outputs: int = 1

    @property
    def last_layer(self) -> str:
        """The name of the weights of the last layer (its bias starts at zero)."""
        return f"kernel_{self.hidden_layers}"

    def setup(self) -> None:  # noqa: D102
        inputs = self.parameter_channels + self.extra_channels + self.time_channels
        sizes = [inputs] + [self.width] * self.hidden_layers + [self.outputs]
        shapes = list(itertools.pairwise(sizes))
        self.kernels = [self.param(f"kernel_{i}", nn.initializers.lecun_normal(), s) for i, s in enumerate(shapes)]
        self.biases = [self.param(f"bias_{i}", nn.initializers.zeros, s[1:]) for i, s in enumerate(shapes)]

    def __call__(
        self,
        features: Sequence[Float[Array, "_ channels"]],
        extra: Sequence[Float[Array, "_ extra"] | None],
        time: Float[Array, "times"],
    ) -> list[Float[Array, "_ outputs"]]:
        """Compute the update of each parameter.

        Args:
            features: for each leaf, the channels of its entries in row-major order.
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
            zeros = [jnp.zeros((size, self.extra_channels)) if e is None else e for size, e in zip(sizes, extra)]
            x = x + kernel[first_extra:first_time].T @ jnp.concatenate(zeros).T
        for kernel, bias in zip(self.kernels[1:], self.biases[1:]):
            x = kernel.T @ jax.nn.relu(x) + bias[:, None]
        offsets = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
        return [outputs.T for outputs in jnp.split(x, offsets, axis=1)]


class UniversalNeuralFunctional(nn.Module):
    """``unf``: a perceptron for each parameter entry by itself, then one linear layer over all entries of the model.

    The perceptron is that of ``ds`` but for its last layer, which is :class:`EquivariantLinear` here:
    it mixes the entries of all tensors as far as the permutations of neuron spaces allow (Zhou et al. 2024,
    arXiv:2402.05232). Neurons of fixed spaces are mixed alike (see there).

    The weights of the last layer belong to the leaves of one model, in their order, and to the spaces of their axes,
    though not to the sizes of the spaces.

    Attributes:
        parameters: all leaves of the model.
        indices: which of them are handled; the others count as zero.
        parameter_channels, extra_channels, time_channels: as for :class:`DeepSets`.
        width: width of the hidden layers.
        hidden_layers: number of hidden layers.
        outputs: number of outputs for each entry.
    """

    parameters: tuple[Parameter, ...]
    indices: tuple[int, ...]
    parameter_channels: int
    extra_channels: int
    time_channels: int
    width: int = 32
    hidden_layers: int = 3
    outputs: int = 1

    @property
    def last_layer(self) -> str:
        """The name of the weights of the last layer."""
        return "layer"

    def setup(self) -> None:  # noqa: D102
        channels = (self.parameter_channels, self.extra_channels, self.time_channels)
        self.mlp = DeepSets(*channels, self.width, self.hidden_layers - 1, outputs=self.width)
        self.layer = EquivariantLinear(tuple(p.spaces for p in self.parameters), self.width, self.outputs)

    def __call__(
        self,
        features: Sequence[Float[Array, "_ channels"]],
        extra: Sequence[Float[Array, "_ extra"] | None],
        time: Float[Array, "times"],
    ) -> list[Float[Array, "_ outputs"]]:
        """Compute the update of each parameter that is handled (arguments and result as for :class:`DeepSets`)."""
        inputs: list[Array | None] = [None] * len(self.parameters)
        for index, x in zip(self.indices, self.mlp(features, extra, time), strict=True):
            inputs[index] = jax.nn.relu(x).reshape(*self.parameters[index].cut_shape, self.width)
        outputs = self.layer(inputs)
        return [y.reshape(-1, self.outputs) for y in (outputs[index] for index in self.indices) if y is not None]
