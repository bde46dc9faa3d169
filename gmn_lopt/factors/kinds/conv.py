"""Convolutions: ``u = a * W + b`` at each position (``conv_general_dilated``, of any geometry and any layout).

Channels are neurons; the set is examples and positions, so factors are images, and the gradient is the convolution's
own derivative. As matrices a kernel is ``[positions x channels in, channels out]``, one for each group, and what it
reads are patches. Those are taken only where they are needed, of a bounded number of examples and positions.

*Noise.* Examples are drawn independently, positions are not. With ``a_np`` the patch and ``g_np`` the tangent of
example ``n`` at position ``p``, what differs independently is ``G_n = sum_p a_np (x) g_np``, and the noise of
``C^-1/2 M`` is ``sum_n G_n^T C^-1 G_n``. For a dense layer that is about ``d sum_n g_n (x) g_n``; positions taken for
elements of the set, ``d sum_np g_np (x) g_np``, would leave out what neighbours have in common. It is estimated without
``G_n``, by some patches ``a_j`` drawn at random: ``G_n^T C^-1 a_j = sum_p (a_np . C^-1 a_j) g_np`` has this second
moment, and ``a_np . C^-1 a_j`` is a convolution with few filters.

Against the exact sum over a batch of 128 digits, for three layers, before, early in and late in training, trace and
cosine were: of positions as elements 0.2 to 1.1 and 0.8 to 1.0; of the tangents' sums over positions 0.8 to 12 and 0.6
to 1.0; of 16 random patches, which is what is used, 0.9 to 1.6 and 0.9 to 1.0. The exact sum over 16 examples is no
better, 0.0 to 1.6: late in training most of the noise is that of few examples. ``tests/test_conv_noise.py`` compares.
The test loss of ``default`` does not tell them apart: ``fashion_mnist_cnn`` after 400 steps, two seeds, had 0.344 with
the noise of examples and 0.342 with that of positions as elements.
"""

import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gmn_lopt.factors.kinds.base import Arrangement, KernelDims, LayerKind, Matrices
from gmn_lopt.factors.kinds.division import DividedKind, divide_neurons, shared_dims
from gmn_lopt.factors.matrices import stack_layout
from gmn_lopt.factors.program import Equation
from gmn_lopt.factors.spaces import Parameter, StructureError
from gmn_lopt.util.inverses import inverse

MOST_PATCHES, FILTERS = 1024, 16


class ImageSet(NamedTuple):
    """A set of examples and positions.

    Attributes:
        parts: sizes of the parts of its axes, in their canonical order.
        order: their order as examples, then positions.
        examples: how many of these are examples.
        image: the sizes of the axes of positions.
    """

    parts: tuple[int, ...]
    order: tuple[int, ...]
    examples: int
    image: tuple[int, ...]

    @classmethod
    def of(cls, arrangement: Arrangement, axes: Sequence[int]) -> "ImageSet":
        """The set of an array whose ``axes`` are positions."""
        dims = arrangement.dims()
        canonical = arrangement.order[: arrangement.set_parts]
        places = {part: i for i, part in enumerate(canonical)}
        examples = [places[part] for part in sorted(canonical) if dims[part] not in axes]
        positions = [places[part] for axis in axes for part in sorted(canonical) if dims[part] == axis]
        parts = tuple(arrangement.cut[part] for part in canonical)
        return cls(parts, (*examples, *positions), len(examples), tuple(arrangement.shape[axis] for axis in axes))

    def images(self, rows: Float[Array, "S n"]) -> Float[Array, "examples positions n"]:
        """Rows as images, of any number of examples."""
        parts = list(self.parts)
        if math.prod(parts) != len(rows):
            if not self.examples or len(rows) % math.prod(self.image):
                raise StructureError(
                    f"a set of {len(rows)} examples x positions does not fit the {math.prod(parts)} of the model that "
                    "was analysed: analyse the loss with a batch of this size"
                )
            parts[self.order[0]] = -1
        moved = rows.reshape(*parts, rows.shape[1]).transpose(*self.order, len(parts))
        return moved.reshape(-1, math.prod(self.image), rows.shape[1])


@dataclass(frozen=True)
class Conv(DividedKind):
    """A convolution with a kernel, in the geometry of ``conv_general_dilated``; axes of images in their order there.

    Attributes:
        strides, padding, dilation: of the window's steps, and of the image.
        window, spread: sizes of the kernel, and its dilation.
        activation, tangent: the sets.
        backwards: along which axes the parameter's positions run the other way.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    window: tuple[int, ...]
    spread: tuple[int, ...]
    activation: ImageSet | None = None
    tangent: ImageSet | None = None
    backwards: tuple[bool, ...] = ()

    @classmethod
    def match(cls, equation: Equation, kernels: Sequence[int]) -> tuple[LayerKind, int] | None:
        """A convolution whose second operand is a kernel."""
        if equation.name != "conv_general_dilated" or 1 not in kernels or equation.params["batch_group_count"] != 1:
            return None
        names = ("window_strides", "padding", "lhs_dilation")
        strides, padding, dilation = (tuple(equation.params[name]) for name in names)
        window = tuple(equation.inputs[1].shape[d] for d in equation.params["dimension_numbers"].rhs_spec[2:])
        spread = tuple(equation.params["rhs_dilation"])
        return cls(strides, tuple(map(tuple, padding)), dilation, window, spread), 1

    def kernel_dims(self, equation: Equation, operand: int) -> KernelDims:
        """Channels read, channels written, and positions; groups are a part of the channels written."""
        outputs, inputs, *positions = equation.params["dimension_numbers"].rhs_spec
        return KernelDims((inputs,), (outputs,), (), tuple(positions), equation.params["feature_group_count"])

    def neuron_dims(self, equation: Equation, operand: int, shared: Collection[int]) -> tuple[set[int], set[int]]:
        """The channels of both."""
        numbers = equation.params["dimension_numbers"]
        return {numbers.lhs_spec[1]}, {numbers.out_spec[1]}

    def arranged(
        self, equation: Equation, activation: Arrangement, tangent: Arrangement, backwards: tuple[bool, ...]
    ) -> LayerKind:
        """With its sets."""
        numbers, loops = equation.params["dimension_numbers"], len(equation.scans)
        reads, writes = ([loops + d for d in spec[2:]] for spec in (numbers.lhs_spec, numbers.out_spec))
        sets = ImageSet.of(activation, reads), ImageSet.of(tangent, writes)
        return replace(self, activation=sets[0], tangent=sets[1], backwards=backwards)

    @property
    def family(self) -> Hashable:
        """Images of one size, examples first: those of several uses are so many more examples."""
        assert self.activation is not None and self.tangent is not None
        sets = (self.activation, self.tangent)
        if any(of.examples != 1 or of.order != tuple(range(len(of.parts))) for of in sets):
            return None
        return replace(self, activation=None, tangent=None), *(of.image for of in sets)

    def matrices(self, kernel: Parameter) -> Matrices | None:
        """One for each group (and stacked layer), where every dimension is a position or runs over neurons."""
        if len(kernel.sites) != 2:
            return None
        read, write = (ref.dims for ref in kernel.sites)
        dims = [*kernel.positions, *{*read, *write}]
        once = len({*read}) == len(read) and len({*write}) == len(write)
        whole = math.prod(kernel.cut_shape[d] for d in kernel.positions) == math.prod(self.window)
        if not (once and whole and sorted(dims) == list(range(len(kernel.cut_shape)))):
            return None
        return Matrices(*stack_layout(kernel)[1], tuple(map(read.index, shared_dims(kernel))))

    def activation_rows(self, kernel: Parameter, activation: Float[Array, "S d_in"]) -> Float[Array, "count R inputs"]:
        """Patches of at most ``MOST_PATCHES`` examples and positions, drawn at random, the same at each step."""
        assert self.activation is not None and self.tangent is not None
        positions = math.prod(self.tangent.image)
        count = len(activation) // math.prod(self.activation.image) * positions
        chosen = np.arange(count)
        if count > MOST_PATCHES:
            chosen = np.sort(np.random.default_rng(0).choice(count, MOST_PATCHES, replace=False, shuffle=False))
        return self.patches(kernel, activation, *np.divmod(chosen, positions))

    def patches(
        self,
        kernel: Parameter,
        activation: Float[Array, "S d_in"],
        examples: Int[np.ndarray, " R"],
        positions: Int[np.ndarray, " R"],
    ) -> Float[Array, "count R inputs"]:
        """What the matrices read for some positions of the output, of an example each."""
        assert self.activation is not None
        taps = self.taps()[positions]
        images = self.activation.images(activation)
        read = jnp.where((taps >= 0)[..., None], images[examples[:, None], np.maximum(taps, 0)], 0)
        divided = divide_neurons(kernel, 0, read.reshape(taps.size, -1))
        return divided.reshape(len(divided), len(taps), -1)

    def taps(self) -> Int[np.ndarray, "positions window"]:
        """The position of the image that each position of the kernel reads, for each of the output; -1 is padding."""
        assert self.activation is not None and self.tangent is not None
        found = np.zeros((1, 1), int)
        axes = zip(self.activation.image, self.tangent.image, self.window, self.backwards, strict=True)
        geometry = zip(self.strides, self.padding, self.dilation, self.spread, strict=True)
        for (size, out, window, backwards), (stride, (before, _), dilation, spread) in zip(axes, geometry):
            tap = np.arange(window)[::-1] if backwards else np.arange(window)
            at = np.arange(out)[:, None] * stride - before + tap * spread
            index, between = np.divmod(at, dilation)
            inside = (between == 0) & (index >= 0) & (index < size)
            here, there = found[:, None, :, None], np.where(inside, index, -1)[None, :, None, :]
            joined = np.where((here < 0) | (there < 0), -1, here * size + there)
            found = joined.reshape(len(found) * out, -1)
        return found

    def noise_rows(
        self,
        kernel: Parameter,
        activation: Float[Array, "S d_in"],
        tangent: Float[Array, "S_out d_out"],
        biased: bool,
        damping: float,
    ) -> Float[Array, "count R outputs"]:
        """For each example, the sum of its tangents weighted by what their patches have in common with random ones."""
        assert self.tangent is not None
        patches = self.activation_rows(kernel, activation)
        patches = jnp.pad(patches, ((0, 0), (0, 0), (0, int(biased))), constant_values=1.0)
        moment = self.second_moment(patches, patches.shape[2])
        scale = jnp.trace(moment, axis1=1, axis2=2)[:, None, None] / len(moment[0])
        damped = moment + (damping * scale + jnp.finfo(moment.dtype).tiny) * jnp.eye(len(moment[0]))
        drawn = patches[:, :: max(1, patches.shape[1] // FILTERS)][:, :FILTERS]
        filters = inverse(damped) @ drawn.mT
        size = jnp.einsum("cij,cik,ckj->c", filters, moment, filters)
        weights = self._convolve(kernel, activation, filters[:, :-1] if biased else filters)
        weights = weights + filters[:, -1] if biased else weights
        images = self.tangent.images(tangent)
        tangents = divide_neurons(kernel, 1, images.reshape(-1, images.shape[2]))
        tangents = tangents.reshape(len(moment), *images.shape[:2], -1)
        rows = jnp.einsum("npcj,cnpo->cnjo", weights, tangents).reshape(len(moment), -1, tangents.shape[-1])
        rescaled = rows.shape[1] / len(tangent) * jnp.where(size > 0, jax.lax.rsqrt(size), 0)
        return rows * rescaled[:, None, None]

    def _convolve(
        self, kernel: Parameter, activation: Float[Array, "S d_in"], filters: Float[Array, "count inputs j"]
    ) -> Float[Array, "examples positions count j"]:
        """This convolution with kernels given as matrices."""
        assert self.activation is not None
        images, rank = self.activation.images(activation), len(self.window)
        divided = divide_neurons(kernel, 0, images.reshape(-1, images.shape[2]))
        shape = len(images), *self.activation.image, images.shape[2]
        image = jnp.moveaxis(divided, 0, 1).reshape(shape)
        kernels = jnp.moveaxis(filters.reshape(len(filters), *self.window, -1, filters.shape[2]), 0, -2)
        kernels = jnp.flip(kernels, [d for d in range(rank) if self.backwards[d]])
        last = tuple(range(1, 1 + rank))
        numbers = jax.lax.ConvDimensionNumbers(
            (0, 1 + rank, *last), (1 + rank, rank, *range(rank)), (0, 1 + rank, *last)
        )
        result = jax.lax.conv_general_dilated(
            image,
            kernels.reshape(*kernels.shape[:-2], -1),
            self.strides,
            self.padding,
            self.dilation,
            self.spread,
            numbers,
            feature_group_count=len(filters),
        )
        return result.reshape(len(images), -1, len(filters), filters.shape[2])
