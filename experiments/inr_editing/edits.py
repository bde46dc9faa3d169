"""What is done to images (arXiv:2507.01649, appendix F.3): dilation, and contrast by equalised lightness."""

import numpy as np
from jaxtyping import Float, Int, UInt8

BINS = 256
# sRGB (IEC 61966-2-1) to CIE XYZ, for a white of (1, 1, 1): rows are divided by that of D65.
_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_XYZ = _XYZ / _XYZ.sum(1, keepdims=True)
_DELTA = 6 / 29


def dilate(images: Float[np.ndarray, "n height width c"]) -> Float[np.ndarray, "n height width c"]:
    """The maximum over each pixel and its eight neighbours; outside of the image there is nothing.

    Example:
        >>> dilate(np.eye(4)[None, :, :, None])[0, :, :, 0].astype(int).tolist()
        [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]
    """
    found = images
    for axis in (1, 2):  # a square is the product of its sides, and so is the maximum over it
        widths = [(1, 1) if i == axis else (0, 0) for i in range(4)]
        padded = np.pad(found, widths, constant_values=-np.inf)
        size = found.shape[axis]
        found = np.maximum.reduce([padded.take(range(i, i + size), axis) for i in range(3)])
    return found


def contrast(
    images: Float[np.ndarray, "n height width 3"], clip: float = 1.0, tiles: int = 3
) -> Float[np.ndarray, "n height width 3"]:
    """RGB images in [0, 1] with their lightness equalised by :func:`clahe`, colours (CIE a, b) as they were.

    Example:
        >>> contrast(np.full((1, 6, 6, 3), 0.5)).shape
        (1, 6, 6, 3)
    """
    lab = rgb_to_lab(images)
    levels = np.rint(lab[..., 0] * (255 / 100)).astype(np.uint8)
    equalised = np.stack([clahe(level, clip, tiles) for level in levels])
    lab[..., 0] = equalised * (100 / 255)
    return np.clip(lab_to_rgb(lab), 0, 1)


def clahe(image: UInt8[np.ndarray, "height width"], clip: float, tiles: int) -> UInt8[np.ndarray, "height width"]:
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994), with the conventions of OpenCV's.

    The image, mirrored at its right and lower edges until ``tiles`` divides its sides, is cut into tiles, so many along
    each side. Each has a histogram of which no bin is higher than ``clip`` times the mean (but at least 1); what is cut
    off is given to all bins evenly. Its cumulative sum maps levels to levels, and a pixel is mapped by the four tiles
    whose centres are nearest to it, bilinearly.

    Example:
        >>> clahe(np.arange(16, dtype=np.uint8).reshape(4, 4), clip=1e9, tiles=1).tolist()[0]
        [16, 32, 48, 64]
    """
    height, width = image.shape
    padded = np.pad(image, ((0, -height % tiles), (0, -width % tiles)), mode="reflect")
    rows, columns = padded.shape[0] // tiles, padded.shape[1] // tiles
    maps = np.empty((tiles, tiles, BINS), np.uint8)
    limit = max(int(clip * rows * columns / BINS), 1)
    for i in range(tiles):
        for j in range(tiles):
            tile = padded[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            histogram = _clipped(np.bincount(tile.ravel(), minlength=BINS), limit)
            scale = np.float32(255 / (rows * columns))
            maps[i, j] = np.clip(np.rint(histogram.cumsum().astype(np.float32) * scale), 0, 255)
    low_i, high_i, to_i = _neighbours(height, rows, tiles)
    low_j, high_j, to_j = _neighbours(width, columns, tiles)
    near = [[maps[i[:, None], j[None, :], image] for j in (low_j, high_j)] for i in (low_i, high_i)]
    upper, lower = ((1 - to_j) * left + to_j * right for left, right in near)
    return np.clip(np.rint((1 - to_i[:, None]) * upper + to_i[:, None] * lower), 0, 255).astype(np.uint8)


def _clipped(histogram: Int[np.ndarray, "bins"], limit: int) -> Int[np.ndarray, "bins"]:
    """Cut bins down to the limit and give what was cut off to all: the rest of the division to every so many-th."""
    excess = int(np.maximum(histogram - limit, 0).sum())
    share, rest = divmod(excess, BINS)
    histogram = np.minimum(histogram, limit) + share
    if rest:
        step = max(BINS // rest, 1)
        histogram[np.arange(0, BINS, step)[:rest]] += 1
    return histogram


def _neighbours(size: int, tile: int, tiles: int) -> tuple[np.ndarray, np.ndarray, Float[np.ndarray, "size"]]:
    """For each pixel of a side the tiles whose centres are next to it, and how far it is on the way between them."""
    position = np.arange(size) / tile - 0.5
    low = np.floor(position).astype(int)
    return np.maximum(low, 0), np.minimum(low + 1, tiles - 1), (position - low).astype(np.float32)


def rgb_to_lab(rgb: Float[np.ndarray, "... 3"]) -> Float[np.ndarray, "... 3"]:
    """CIE L*a*b* (lightness from 0 to 100) of sRGB colours in [0, 1].

    Example:
        >>> rgb_to_lab(np.ones(3)).round(3).tolist()
        [100.0, 0.0, 0.0]
    """
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ _XYZ.T
    f = np.where(xyz > _DELTA**3, np.cbrt(xyz), xyz / (3 * _DELTA**2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def lab_to_rgb(lab: Float[np.ndarray, "... 3"]) -> Float[np.ndarray, "... 3"]:
    """The inverse of :func:`rgb_to_lab`; colours that sRGB does not have are below 0 or above 1."""
    lightness, a, b = np.moveaxis(lab, -1, 0)
    y = (lightness + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], -1)
    xyz = np.where(f > _DELTA, f**3, 3 * _DELTA**2 * (f - 4 / 29))
    linear = xyz @ np.linalg.inv(_XYZ).T
    bright = 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055
    return np.where(linear > 0.0031308, bright, 12.92 * linear)
