"""Positional encodings: what tells GradMetaNet's neurons apart that no symmetry makes interchangeable."""

import numpy as np
from jaxtyping import Float

from gmn_lopt.factors.structure import GradientStructure, Parameter, Site

KINDS = ("input", "inner", "output")
SITE_FEATURES = 8
NEURON_FEATURES = 16
BLOCK_FEATURES = 8
WIDEST = 32.0  # the longest wave over a window, by two pi
ENCODING_FEATURES = len(KINDS) + SITE_FEATURES + NEURON_FEATURES + BLOCK_FEATURES


def encode_sites(structure: GradientStructure) -> tuple[Float[np.ndarray, "neurons encoding"], ...]:
    """Encode every neuron of every site (step 1 of :mod:`gmn_lopt.networks.gradmetanet`).

    An encoding of ``ENCODING_FEATURES`` numbers consists of the site's kind (one-hot: only read, inner, only written);
    sinusoids of the site's index; sinusoids of the neuron's index, at fixed sites; and sinusoids of the block index
    (a head), at sites that are the product of fixed and permutable spaces. What does not apply is zero, which no
    sinusoidal encoding is. So permutable neurons of one site get equal encodings, and no two sites do:

    - a site with a permutable space has its index in program order;
    - a site that is fixed throughout is known by its kind and its neurons' indices; its site index only counts the
      fixed sites of its kind (0 for the input and for the output of most models), so that it does not depend on depth.

    Args:
        structure: the model's structure.

    Returns:
        One constant array for each site, in the order of ``structure.sites``.
    """
    encodings = []
    fixed_seen = dict.fromkeys(KINDS, 0)
    for index, site in enumerate(structure.sites):
        if not structure.is_permutable(site):
            index = fixed_seen[site.kind]
            fixed_seen[site.kind] += 1
        encodings.append(_encode_site(structure, site, index))
    return tuple(encodings)


def _encode_site(structure: GradientStructure, site: Site, index: int) -> np.ndarray:
    kind = np.zeros((site.size, len(KINDS)))
    kind[:, KINDS.index(site.kind)] = 1.0
    position = np.zeros((site.size, NEURON_FEATURES))
    block = np.zeros((site.size, BLOCK_FEATURES))
    if not structure.is_permutable(site):
        position = sinusoids(np.arange(site.size), NEURON_FEATURES)
    else:
        sizes = [structure.spaces[space].size for space in site.spaces]
        fixed = [i for i, space in enumerate(site.spaces) if not structure.spaces[space].permutable]
        if fixed:
            coordinates = np.unravel_index(np.arange(site.size), sizes)
            blocks = np.ravel_multi_index([coordinates[i] for i in fixed], [sizes[i] for i in fixed])
            block = sinusoids(blocks, BLOCK_FEATURES)
    site_index = sinusoids(np.full(site.size, index), SITE_FEATURES)
    return np.concatenate([kind, site_index, position, block], axis=1).astype(np.float32)


def encode_window(parameter: Parameter, features: int) -> Float[np.ndarray, "... features"]:
    """Encode the positions of a kernel's window, along the dimensions of its cut shape or 1.

    Each axis has its share of the features: sinusoids of the distance from the window's middle, so that windows of two
    sizes agree on where that is, and on left and right of it.
    """
    sizes = [parameter.cut_shape[d] for d in parameter.positions]
    share = features // max(1, len(sizes)) // 2 * 2
    shape = [1] * len(parameter.cut_shape)
    for d, size in zip(parameter.positions, sizes):
        shape[d] = size
    encoding = np.zeros((*shape, features), np.float32)
    for i, (d, size) in enumerate(zip(parameter.positions, sizes)):
        along = [size if e == d else 1 for e in range(len(shape))]
        encoded = sinusoids(np.arange(size) - (size - 1) / 2, share, WIDEST)
        encoding[..., i * share : (i + 1) * share] = encoded.reshape(*along, share)
    return encoding


def sinusoids(positions: np.ndarray, features: int, longest: float = 10_000.0) -> Float[np.ndarray, "n features"]:
    """Sines and cosines of ``positions`` at ``features / 2`` frequencies, geometric from 1 to ``1 / longest``."""
    frequencies = longest ** -np.linspace(0.0, 1.0, features // 2)
    angles = np.asarray(positions)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
