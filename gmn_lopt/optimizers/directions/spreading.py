"""Which preconditioners are computed anew at which step: of small models all at once, of large ones a part in turn.

Where all are due at every fifth step, that step is slow: of a large model several times the others. So its matrices are
dealt out to five parts of about equal cost, one for each step in turn. What reads the same activations stays together,
and what follows each other in the model, so that a part of a stack is a few slices of it. Of small models the number of
operations is the cost, and they keep the one step for all.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from gmn_lopt.optimizers.directions.denoised_layers import DenoisedLayer, LayerGroup, Sets

# Preconditioners are new in the first EARLY steps and every EVERY steps.
EARLY, EVERY = 10, 5
# Operations of all of them from which on they are spread: some ten milliseconds of a core.
SPREAD = 1e9


class Part(NamedTuple):
    """Some of the matrices of a group, which are due together.

    Attributes:
        position: that of the group.
        group: these matrices as a group.
        activations: their places among the ``u`` distinct activations of the whole.
        matrices: their places among its ``k`` matrices.
        read, written: which of the whole group's sets of activations, and of tangents, are theirs.
    """

    position: int
    group: LayerGroup
    activations: tuple[int, ...]
    matrices: tuple[int, ...]
    read: tuple[int, ...]
    written: tuple[int, ...]

    def sets_of(self, whole: Sets) -> Sets:
        """Their sets, of those of the whole group."""
        return tuple(whole[0][i] for i in self.read), tuple(whole[1][i] for i in self.written)


def parts(groups: Sequence[LayerGroup]) -> tuple[tuple[Part, ...], ...]:
    """The parts that take turns: one with all that there is, or :data:`EVERY`; each matrix is in one of them."""
    whole = [_part(i, group, 0, _distinct(group)) for i, group in enumerate(groups)]
    if sum(_cost(part) for part in whole) < SPREAD:
        return (tuple(whole),)
    pieces = [piece for part in whole for piece in _pieces(part)]
    turns: list[list[Part]] = [[] for _ in range(EVERY)]
    costs = [0.0] * EVERY
    for piece in sorted(pieces, key=_cost, reverse=True):  # the largest first, each where there is least so far
        least = costs.index(min(costs))
        turns[least].append(piece)
        costs[least] += _cost(piece)
    return tuple(tuple(sorted(turn, key=lambda part: (part.position, part.activations))) for turn in turns)


def is_large(groups: Sequence[LayerGroup]) -> bool:
    """Whether preconditioners are spread over steps."""
    return len(parts(groups)) > 1


def due(step: Int[Array, ""], turn: int, turns: int) -> Bool[Array, ""]:
    """Whether a part is computed anew after ``step`` steps."""
    return (step < EARLY) | (step % EVERY == turn % EVERY)


def times_due(step: Int[Array, ""], turn: int) -> Int[Array, ""]:
    """How often a part has been due after ``step`` steps, when it is due again, this time included."""
    first = EARLY + (turn - EARLY) % EVERY
    return jnp.minimum(step + 1, EARLY) + jnp.maximum(0, (step - first) // EVERY + 1)


def _pieces(part: Part) -> list[Part]:
    """A group in :data:`EVERY` pieces of about the same number of activations, or as many as it has."""
    group, count = part.group, len(part.activations)
    if len({(layer.inputs, layer.outputs) for layer in group.layers}) > 1:
        return [part]  # small ones that are padded: a stack only as a whole
    ends = [round(count * i / min(EVERY, count)) for i in range(min(EVERY, count) + 1)]
    return [_part(part.position, group, start, end) for start, end in itertools.pairwise(ends)]


def _part(position: int, group: LayerGroup, start: int, end: int) -> Part:
    """The matrices of a group that read its distinct activations from ``start`` to ``end``."""
    begin, begins = 0, {}
    for layer in group.readers:
        begins[layer.reads] = begin
        begin += layer.count
    layers: list[DenoisedLayer] = []
    matrices: list[int] = []
    tangents: list[int] = []
    seen = 0
    for i, layer in enumerate(group.layers):
        first = begins[layer.reads]
        low, high = max(start - first, 0), min(end - first, layer.count)
        if low < high:
            layers.append(_some(layer, low, high))
            matrices += range(seen + low, seen + high)
            tangents.append(i)
        seen += layer.count
    kept = {layer.reads for layer in layers}
    activations = tuple(i for i, layer in enumerate(group.readers) if layer.reads in kept)
    some = replace(group, layers=tuple(layers))
    return Part(position, some, tuple(range(start, end)), tuple(matrices), activations, tuple(tangents))


def _some(layer: DenoisedLayer, low: int, high: int) -> DenoisedLayer:
    """Some of the matrices of a layer."""
    if (low, high) == (0, layer.count):
        return layer
    return replace(layer, start=layer.start + low, matrices=replace(layer.matrices, count=high - low))


def _distinct(group: LayerGroup) -> int:
    return sum(layer.count for layer in group.readers)


def _cost(part: Part) -> float:
    """About how many multiplications it takes: of inverses, a few for each root, and the products before it."""
    group = part.group
    side = min(group.inputs, group.outputs)
    inverses = 0 if group.diagonal else group.blocks * group.rows**3
    of_matrix = 5 * side**3 + group.rows * group.inputs * group.outputs + side * group.inputs * group.outputs
    if group.residual:
        of_matrix += group.outputs**3  # the inverse of the tangents' moment
    return float(len(part.activations) * inverses + len(part.matrices) * of_matrix)


def take(values: Shaped[Array, "n ..."], places: Sequence[int]) -> Shaped[Array, "m ..."]:
    """The values at places that are in order: slices, where they follow each other."""
    if tuple(places) == tuple(range(len(values))):
        return values
    found = [values[start:end] for start, end in _runs(places)]
    return found[0] if len(found) == 1 else jnp.concatenate(found)


def put(values: Float[Array, "n ..."], places: Sequence[int], new: Float[Array, "m ..."]) -> Float[Array, "n ..."]:
    """Undo :func:`take`: ``values`` with new ones at these places."""
    if tuple(places) == tuple(range(len(values))):
        return new
    done = 0
    for start, end in _runs(places):
        values = values.at[start:end].set(new[done : done + end - start])
        done += end - start
    return values


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each run of places that follow each other."""
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(np.asarray(places), cuts)]
