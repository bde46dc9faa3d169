"""Convolutions of all geometries, for tests: ``name -> (loss_fn, params, args)``."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BATCH = 6


def draw(seed=0, **shapes):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=s) / max(1, np.prod(s[:-1])) ** 0.5, jnp.float32) for n, s in shapes.items()}


def images(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def convolution(layout, image, kernel, bias=None, **geometry):
    """A convolution with channels that may be permuted on both sides: between a dense layer and a readout."""
    numbers = lax.conv_dimension_numbers(image, kernel, layout)
    channels_in = image[numbers.lhs_spec[1]]
    channels_out = kernel[numbers.rhs_spec[0]]
    params = draw(kernel=kernel, first=(3, channels_in), out=(channels_out, 5))
    if bias is not None:
        params |= draw(bias=bias)
    strides = geometry.pop("strides", (1,) * (len(image) - 2))
    padding = geometry.pop("padding", "SAME")

    def loss(p, x):
        x = jnp.moveaxis(jnp.tanh(x @ p["first"]), -1, numbers.lhs_spec[1])
        y = lax.conv_general_dilated(x, p["kernel"], strides, padding, dimension_numbers=layout, **geometry)
        y = y + p["bias"] if bias is not None else y
        y = jnp.moveaxis(jnp.sin(y), numbers.out_spec[1], -1)
        weights = jnp.arange(1.0, 1 + y[0, ..., 0].size).reshape(y[0, ..., 0].shape)[..., None]
        return jnp.mean((y * weights @ p["out"]) ** 3)

    shape = [size for d, size in enumerate(image) if d != numbers.lhs_spec[1]]
    return loss, params, (images(*shape, 3),)


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


def transposed():
    params = draw(kernel=(3, 3, 5, 4), first=(3, 4), out=(5, 2))

    def loss(p, x):
        y = lax.conv_transpose(jnp.tanh(x @ p["first"]), p["kernel"], (2, 2), "SAME", transpose_kernel=True)
        return jnp.mean((jnp.sin(y) @ p["out"]) ** 3)

    return loss, params, (images(BATCH, 5, 4, 3),)


def one_filter():
    """``jnp.convolve`` with one filter, which it turns around."""
    loss = lambda p, x: jnp.mean(jax.vmap(lambda row: jnp.convolve(row, p["kernel"], mode="same"))(x) ** 3)  # noqa: E731
    return loss, draw(kernel=(5,)), (images(BATCH, 11),)


def flat_kernel():
    """A kernel that is stored as a matrix."""
    params = draw(kernel=(9 * 4, 6), first=(3, 4))

    def loss(p, x):
        kernel = p["kernel"].reshape(3, 3, 4, 6)
        y = lax.conv_general_dilated(jnp.tanh(x @ p["first"]), kernel, (2, 1), "VALID", dimension_numbers=NHWC)
        return jnp.mean(jnp.sin(y) ** 3)

    return loss, params, (images(BATCH, 7, 6, 3),)


def scanned(groups=1):
    """Residual blocks under a scan, their kernels stacked."""
    params = draw(kernel=(3, 3, 3, 4 // groups, 4), bias=(3, 4), first=(3, 4), mix=(3, 4, 4))

    def loss(p, x):
        def block(x, w):
            y = lax.conv_general_dilated(
                x, w["kernel"], (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=groups
            )
            return x + jnp.tanh(y + w["bias"]) @ w["mix"], None

        x, _ = lax.scan(block, x @ p["first"], {name: p[name] for name in ("kernel", "bias", "mix")})
        return jnp.mean(x**3)

    return loss, params, (images(BATCH, 5, 4, 3),)


def examples_innermost():
    """The set's axes in another order than examples, rows, columns."""
    params = draw(kernel=(3, 2, 4, 6), first=(3, 4), bias=(6,))

    def loss(p, x):
        x = jnp.tanh(jnp.einsum("whbi,ic->whcb", x, p["first"]))
        y = lax.conv_general_dilated(x, p["kernel"], (2, 1), "SAME", dimension_numbers=("WHCN", "HWIO", "NCWH"))
        return jnp.mean(jnp.sin(y + p["bias"][:, None, None]) ** 3)

    return loss, params, (images(5, 4, BATCH, 3),)


def two_example_axes():
    """Clips of frames: the set is clips, frames and positions."""
    params = draw(kernel=(3, 3, 4, 6), first=(3, 4), out=(6, 2))

    def loss(p, x):
        x = jnp.tanh(x @ p["first"])
        flat = x.reshape(-1, *x.shape[2:])
        y = lax.conv_general_dilated(flat, p["kernel"], (2, 2), "SAME", dimension_numbers=NHWC)
        y = jnp.sin(y).reshape(*x.shape[:2], *y.shape[1:]).mean((1, 2, 3))
        return jnp.mean((y @ p["out"]) ** 3)

    return loss, params, (images(BATCH, 2, 5, 4, 3),)


def ensemble():
    """Several kernels under ``vmap``, each on images of its own: one convolution in groups."""
    params = draw(kernel=(2, 3, 3, 4, 6), first=(2, 3, 4), bias=(2, 6), out=(2, 6, 3))

    def one(p, x):
        y = lax.conv_general_dilated(jnp.tanh(x @ p["first"]), p["kernel"], (2, 1), "SAME", dimension_numbers=NHWC)
        return jnp.sin(y + p["bias"]).mean((1, 2)) @ p["out"]

    return lambda p, x: jnp.mean(jax.vmap(one)(p, x) ** 3), params, (images(2, BATCH, 5, 4, 3),)


CONVOLUTIONS = {
    "plain": lambda: convolution(NHWC, (BATCH, 5, 4, 4), (3, 3, 4, 6), (6,)),
    "channels first": lambda: convolution(NCHW, (BATCH, 4, 5, 4), (6, 4, 3, 3), (6, 1, 1)),
    "odd layout": lambda: convolution(("HNCW", "IWOH", "NHCW"), (5, BATCH, 4, 6), (4, 2, 6, 3)),
    "valid": lambda: convolution(NHWC, (BATCH, 5, 4, 4), (3, 2, 4, 6), padding="VALID"),
    "strided": lambda: convolution(NHWC, (BATCH, 5, 4, 4), (3, 3, 4, 6), (6,), strides=(2, 1)),
    "negative padding": lambda: convolution(NHWC, (BATCH, 5, 4, 4), (2, 1, 4, 6), padding=[(-1, 2), (1, -2)]),
    "dilated": lambda: convolution(NHWC, (BATCH, 7, 6, 4), (3, 2, 4, 6), rhs_dilation=(2, 3)),
    "dilated image": lambda: convolution(
        NHWC, (BATCH, 3, 4, 4), (3, 3, 4, 6), padding=[(2, 2), (1, 0)], lhs_dilation=(2, 3)
    ),
    "transposed": transposed,
    "grouped": lambda: convolution(NHWC, (BATCH, 5, 4, 6), (3, 3, 2, 9), (9,), feature_group_count=3),
    "grouped first": lambda: convolution(NCHW, (BATCH, 6, 5, 4), (9, 2, 3, 3), (9, 1, 1), feature_group_count=3),
    "depthwise": lambda: convolution(NHWC, (BATCH, 5, 4, 6), (3, 3, 1, 6), (6,), feature_group_count=6),
    "depth multiplied": lambda: convolution(NHWC, (BATCH, 5, 4, 3), (3, 3, 1, 6), (6,), feature_group_count=3),
    "patches": lambda: convolution(NHWC, (BATCH, 6, 4, 4), (3, 2, 4, 6), (6,), strides=(3, 2), padding="VALID"),
    "1x1": lambda: convolution(NHWC, (BATCH, 5, 4, 4), (1, 1, 4, 6), (6,)),
    "1x1 strided": lambda: convolution(NHWC, (BATCH, 5, 4, 4), (1, 1, 4, 6), strides=(2, 2)),
    "1-D": lambda: convolution(("NWC", "WIO", "NWC"), (BATCH, 9, 4), (4, 4, 6), (6,), strides=(3,)),
    "3-D": lambda: convolution(("NDHWC", "DHWIO", "NDHWC"), (BATCH, 3, 4, 3, 2), (2, 3, 2, 2, 5), (5,)),
    "one filter": one_filter,
    "flat kernel": flat_kernel,
    "ensemble": ensemble,
    "scanned": scanned,
    "scanned, grouped": lambda: scanned(groups=2),
    "examples innermost": examples_innermost,
    "two axes of examples": two_example_axes,
}
