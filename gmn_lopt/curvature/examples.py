"""The gradient of each example of a batch by itself, in factors: what estimators of the Fisher matrix read."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gmn_lopt.factors import Factors, GradientStructure, StructureError, analyze, factors_and_remainder
from gmn_lopt.factors.names import leaf_name
from gmn_lopt.factors.structure import Layer

T = TypeVar("T")
ENTRIES = 2**22  # of what is built for each example; so many exist at a time, or those of one example


class Examples:
    """A loss, and a batch of examples each of which is taken as a batch of one.

    The backward pass is run under ``vmap`` over batches of one example, so that the factors of each are apart, however
    its layers lay out their sets: ``[N, S, d]``, where ``S`` are the positions inside one example (tokens, pixels; 1 in
    a multi-layer perceptron).

    Attributes:
        structure: the structure of the loss of one example.
        count: the number of examples, ``N``.
        leaves: the parameters.
    """

    def __init__(self, loss_fn: Callable[..., Any], params: PyTree, batch: Sequence[PyTree]) -> None:
        self.loss_fn, self.params, self.batch = loss_fn, params, tuple(batch)
        self.count = _count(self.batch)
        self.leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *jnp.shape(x)[1:]), jnp.result_type(x)), self.batch)
        self.structure: GradientStructure = analyze(loss_fn, params, *first)

    def backward(self, example: Sequence[PyTree]) -> tuple[Factors, dict[int, Array]]:
        """The factors ``[S, d]`` of one example, and the gradients of the leaves that have none, by index."""
        return factors_and_remainder(self.loss_fn, self.params, *as_batch(example))

    def losses(self, leaves: Sequence[Array]) -> Float[Array, "N"]:
        """The loss of each example, of other parameters."""
        params = jax.tree.unflatten(jax.tree.structure(self.params), leaves)
        return jax.vmap(lambda *example: self.loss_fn(params, *as_batch(example)))(*self.batch)

    def gradients(self, factors: Factors, example: Sequence[PyTree]) -> list[Array]:
        """The gradient of each leaf that the factors of one example give."""
        return jax.tree.leaves(self.structure.reconstruct(factors, self.params, *as_batch(example)))

    def total(self, of_chunk: Callable[[Any, Float[Array, "n"]], T], entries: int) -> T:
        """The sum of what a function makes of some examples at a time.

        Args:
            of_chunk: takes examples, and the weights 1 and 0: the last chunk is filled up with examples of weight 0.
            entries: how many numbers it builds for each example.
        """
        size = max(1, min(self.count, ENTRIES // max(1, entries)))
        chunks = math.ceil(self.count / size)
        size = math.ceil(self.count / chunks)
        place = jnp.arange(chunks * size).reshape(chunks, size)
        weights = (place < self.count).astype(jnp.float32)

        def add(total: T, chunk: tuple[Array, Array]) -> tuple[T, None]:
            index, weight = chunk
            part = jax.tree.map(lambda x: jnp.asarray(x)[index], self.batch) if chunks > 1 else self.batch
            return jax.tree.map(jnp.add, total, of_chunk(part, weight)), None

        shapes = jax.eval_shape(of_chunk, jax.tree.map(lambda x: jnp.asarray(x)[:size], self.batch), weights[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        # A loop also where there is one chunk: what is not used of a backward pass is left out when it is compiled.
        return jax.lax.scan(add, zeros, (place, weights))[0]

    @cached_property
    def single_kernels(self) -> dict[int, Layer]:
        """The leaves that are the kernel of one layer, entry by entry, and nothing else; by index, with that layer."""
        layers, structure = self.structure.layers, self.structure
        reached: dict[int, list[Layer]] = {}
        derived: set[int] = set()
        for layer in layers:
            shapes = structure.activation_shapes[layer.activation], structure.tangent_shapes[layer.tangent]
            dtypes = (jnp.float32 if layer.kind.reads_neurons else jnp.int32), jnp.float32
            assert layer.gradients is not None
            parts = jax.eval_shape(layer.gradients, *map(jax.ShapeDtypeStruct, shapes, dtypes))
            for leaf in parts.leaves:
                reached.setdefault(leaf, []).append(layer)
            derived |= set(layer.leaves) if parts.derived else set()
            if len(parts.derived) > (not layer.direct):  # a bias that is computed, from any leaves
                derived |= set(range(len(structure.parameters)))
        return {
            leaf: own[0]
            for leaf, own in reached.items()
            if len(own) == 1
            and own[0].kernel == leaf
            and leaf not in derived
            and structure.parameters[leaf].status == "factored"
            and own[0].kind.matrices(structure.parameters[leaf]) is not None
        }

    def positions(self, layer: Layer) -> int:
        """How many elements the sets of a layer have inside one example: its activation's and its tangent's."""
        sizes = self.structure.activation_shapes[layer.activation][0], self.structure.tangent_shapes[layer.tangent][0]
        return max(sizes)


def as_batch(example: PyTree) -> Any:
    """An example as a batch of one."""
    return jax.tree.map(lambda x: jnp.asarray(x)[None], example)


def _count(batch: tuple[PyTree, ...]) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    sizes = {leaf_name(path): jnp.shape(x)[:1] for path, x in leaves}
    odd = next((name for name, size in sizes.items() if not size), None)
    if odd is not None:
        raise StructureError(f"batch{odd} is no array with examples in front: let the loss function close over it")
    if len({*sizes.values()}) > 1:
        listed = ", ".join(f"batch{name} has {size[0]}" for name, size in sizes.items())
        raise StructureError(f"arrays of the batch differ in the number of examples: {listed}")
    if not sizes or sizes.popitem()[1] == (0,):
        raise StructureError("the batch has no example")
    return int(jnp.shape(leaves[0][1])[0])
