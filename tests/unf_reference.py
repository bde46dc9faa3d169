"""The layer of universal neural functionals, weight by weight, in numpy: the matrix of each partial matching."""

import itertools

import numpy as np

from gmn_lopt.networks.unf import find_views


def matching(read, write, in_shape, out_shape):
    """The linear map that averages over a view's entries and writes to another's: ``[*out_shape, *in_shape]``."""
    matrix = np.zeros((*out_shape, *in_shape))
    count = np.prod([in_shape[block[0]] for block in read.rest], initial=1.0)
    for out_index in np.ndindex(*out_shape):
        for in_index in np.ndindex(*in_shape):
            on_diagonals = all(
                len({index[d] for d in block}) == 1
                for view, index in ((read, in_index), (write, out_index))
                for block in (*view.kept, *view.rest)
            )
            matched = all(in_index[a[0]] == out_index[b[0]] for a, b in zip(read.kept, write.kept, strict=True))
            matrix[(*out_index, *in_index)] = (on_diagonals and matched) / count
    return matrix


def apply(leaves, stacks, weights, inputs):
    """Sum over pairs of leaves and over matchings, one ``[f_in, f_out]`` matrix each; a bias for each leaf."""
    reads, writes = find_views(tuple(map(tuple, leaves)), tuple(stacks.items()))
    in_features = inputs[0].shape[-1]
    outputs = []
    for leaf, x in enumerate(inputs):
        kernel = np.asarray(weights[f"kernel_{leaf}"], np.float64)
        biases = iter(np.asarray(weights[f"bias_{leaf}"], np.float64).reshape(-1, kernel.shape[1]))
        blocks = iter(np.split(kernel, len(kernel) // in_features))
        y = np.zeros((*x.shape[:-1], kernel.shape[1]))
        for pattern, views in writes.items():
            for write in (view for view in views if view.leaf == leaf):
                for read in reads[pattern]:
                    source = inputs[read.leaf]
                    m = matching(read, write, source.shape[:-1], x.shape[:-1])
                    y += np.tensordot(m, source, source.ndim - 1) @ next(blocks)
                if not pattern:
                    y += diagonal(write, x.shape[:-1])[..., None] * next(biases)
        assert next(blocks, None) is None and next(biases, None) is None
        outputs.append(y)
    return outputs


def diagonal(view, shape):
    """One where all blocks of a view are on their diagonals, else zero."""
    blocks = (*view.kept, *view.rest)
    ones = [float(all(len({index[d] for d in block}) == 1 for block in blocks)) for index in np.ndindex(*shape)]
    return np.reshape(ones, shape)


def moved(leaf, sizes, stacks, permutations):
    """Where each entry of a leaf comes from; a stacked space has a permutation at each position in its stack."""
    indices = np.indices([sizes[s] for s in leaf])
    along = [[indices[leaf.index(s)] for s in stacks.get(space, ())] for space in leaf]
    return tuple(permutations[space][(*at, indices[dim])] for dim, (space, at) in enumerate(zip(leaf, along)))


def group(sizes, stacks):
    """All elements of the group: for each space its permutations, one at each position in its stack."""
    each = []
    for space, size in sorted(sizes.items()):
        positions = [sizes[s] for s in stacks.get(space, ())]
        choices = itertools.product(itertools.permutations(range(size)), repeat=int(np.prod(positions)))
        each.append([np.reshape(choice, (*positions, size)) for choice in choices])
    for permutations in itertools.product(*each):
        yield dict(zip(sorted(sizes), permutations))


def group_dimension(leaves, sizes, stacks):
    """The dimension of all equivariant linear maps, and of all equivariant constants.

    It is the trace of the projection onto them, which is the mean over the group of the squared characters: of the
    number of entries that a permutation leaves where they are, squared (for constants: itself).
    """
    characters = []
    for permutations in group(sizes, stacks):
        there = [np.array(moved(leaf, sizes, stacks, permutations)) for leaf in leaves]
        here = [np.indices([sizes[s] for s in leaf]) for leaf in leaves]
        characters.append(sum(int((a == b).all(0).sum()) for a, b in zip(there, here)))
    return round(np.mean(np.square(characters))), round(np.mean(characters))
