"""Random permutations of the neuron spaces of a structure, applied to parameters and factors."""

import jax
import numpy as np

from gmn_lopt import Factors


def draw(structure, seed):
    """One permutation of each space (one for each position in its stack), the identity for fixed ones."""
    rng = np.random.default_rng(seed)
    permutations = []
    for space in structure.spaces:
        stack = [structure.spaces[i].size for i in space.stack]
        same = np.broadcast_to(np.arange(space.size), (*stack, space.size))
        permutations.append(rng.permuted(same, axis=-1) if space.permutable else same)
    return permutations


def take(structure, permutations, array, spaces):
    """Permute an array whose leading dimensions run over the given spaces."""
    result = array
    for dim, space in enumerate(spaces):
        stack = structure.spaces[space].stack
        dims = [*(spaces.index(i) for i in stack), dim]
        index = np.asarray(permutations[space]).transpose(np.argsort(dims))
        shape = [1] * array.ndim
        for d in dims:
            shape[d] = array.shape[d]
        result = np.take_along_axis(result, index.reshape(shape), axis=dim)
    return result


def parameters(structure, permutations, tree):
    """Permute a tree shaped like the parameters (trailing dimensions are left alone)."""
    leaves = []
    for parameter, leaf in zip(structure.parameters, jax.tree.leaves(tree), strict=True):
        array = np.asarray(leaf)
        array = array.reshape(parameter.cut_shape + array.shape[len(parameter.shape) :])
        leaves.append(take(structure, permutations, array, parameter.spaces).reshape(np.shape(leaf)))
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def factors(structure, permutations, values):
    """Permute the neurons of factors."""
    activations, tangents = list(values.activations), list(values.tangents)
    for site in structure.sites:
        shape = [structure.spaces[i].size for i in site.spaces]
        order = take(structure, permutations, np.arange(site.size).reshape(shape), site.spaces)
        if site.activation is not None:
            activations[site.activation] = activations[site.activation][:, order.ravel()]
        if site.tangent is not None:
            tangents[site.tangent] = tangents[site.tangent][:, order.ravel()]
    return Factors(tuple(activations), tuple(tangents))
