"""Random permutations of the neuron spaces of a structure, applied to parameters and factors."""

import jax
import numpy as np

from gmn_lopt import Factors


def draw(structure, seed):
    """One permutation of each space, the identity for fixed ones."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(s.size) if s.permutable else np.arange(s.size) for s in structure.spaces]


def parameters(structure, permutations, tree):
    """Permute a tree shaped like the parameters (trailing dimensions are left alone)."""
    leaves = []
    for parameter, leaf in zip(structure.parameters, jax.tree.leaves(tree), strict=True):
        array = np.asarray(leaf)
        array = array.reshape(parameter.cut_shape + array.shape[len(parameter.shape) :])
        for dim, space in enumerate(parameter.spaces):
            array = np.take(array, permutations[space], axis=dim)
        leaves.append(array.reshape(np.shape(leaf)))
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def factors(structure, permutations, values):
    """Permute the neurons of factors."""
    activations, tangents = list(values.activations), list(values.tangents)
    for site in structure.sites:
        shape = [structure.spaces[i].size for i in site.spaces]
        order = np.arange(site.size).reshape(shape)
        for dim, space in enumerate(site.spaces):
            order = np.take(order, permutations[space], axis=dim)
        if site.activation is not None:
            activations[site.activation] = activations[site.activation][:, order.ravel()]
        if site.tangent is not None:
            tangents[site.tangent] = tangents[site.tangent][:, order.ravel()]
    return Factors(tuple(activations), tuple(tangents))
