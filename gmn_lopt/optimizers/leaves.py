"""Whether what a learned optimizer is given belongs to the model that was analysed, and to its architecture."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from gmn_lopt.factors.names import comparable, leaf_name
from gmn_lopt.factors.structure import Factors, GradientStructure, Parameter, StructureError

# Booleans for parameters, as optax takes them: a tree like them, a prefix of it, or a function that makes one.
Mask = Any


class Gradient(NamedTuple):
    """The gradient of a step, and what it is the gradient of.

    Attributes:
        structure: of the model.
        indices: which of the structure's parameters are handled, in their order in ``grads``; optax may mask some.
        grads: their gradients, float32.
        factors: those of the whole model, float32, the tangents at per-element scale; None where they are not needed.
    """

    structure: GradientStructure
    indices: list[int]
    grads: PyTree
    factors: Factors | None

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters that are handled."""
        return [self.structure.parameters[i] for i in self.indices]

    def like_grads(self, leaves: Any) -> PyTree:
        """Arrays for each leaf as a tree shaped like the gradients."""
        return jax.tree.unflatten(jax.tree.structure(self.grads), leaves)


def check_meta_parameters(phi: PyTree, template: PyTree) -> None:
    """Raise a ValueError unless ``phi`` is shaped like ``template``."""
    given, expected = (
        {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (phi, template)
    )
    for name in [*expected, *given]:
        if given.get(name) == expected.get(name):
            continue
        if name not in given:
            problem = f"phi lacks {name}"
        elif name not in expected:
            problem = f"phi holds {name}, which this architecture does not have"
        else:
            problem = f"phi{name} has shape {given[name]}, but {expected[name]} in this architecture"
        raise ValueError(f"{problem}: use meta-parameters from the init of the same LearnedOptimizer")


def match_leaves(structure: GradientStructure, tree: PyTree, what: str) -> list[int]:
    """The index in ``structure.parameters`` of each leaf of ``tree``, some of which optax may have masked.

    Raises:
        StructureError: if a leaf is not one of the structure's, has another shape, or is missing without a mask.
    """
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    index_of = {comparable(p.name): i for i, p in enumerate(structure.parameters)}
    indices, masked = [], []
    for path, leaf in jax.tree.flatten_with_path(tree, is_leaf=is_masked)[0]:
        name = comparable(leaf_name(path))
        if is_masked(leaf):
            masked.append(name)
            continue
        if name not in index_of:
            raise StructureError(
                f"{what} {leaf_name(path) or '(the root)'} is not in the analysed model, which has "
                f"{', '.join(p.name for p in structure.parameters)}: analyse the model that is being trained"
            )
        expected = structure.parameters[index_of[name]].shape
        if jnp.shape(leaf) != expected:
            raise StructureError(
                f"{what} {leaf_name(path)} has shape {jnp.shape(leaf)}, but {expected} in the analysed model: "
                "analyse the model that is being trained"
            )
        indices.append(index_of[name])
    found = [i for n, i in index_of.items() if i in set(indices) or any(n.startswith(m) for m in masked)]
    missing = [p.name for i, p in enumerate(structure.parameters) if i not in found]
    # A tree without any leaf is optax's placeholder in tree_map_params, or everything is masked.
    if missing and (indices or masked):
        raise StructureError(f"{what} {missing[0]} of the analysed model is missing: analyse the model being trained")
    return indices


def masked_leaves(mask: Mask, params: PyTree) -> list[Any]:
    """What a mask says of each leaf of ``params``.

    Raises:
        StructureError: it is no tree of booleans, or not one for these parameters.

    Example:
        >>> masked_leaves({"a": True, "b": False}, {"a": jnp.ones(2), "b": [jnp.ones(3), jnp.ones(1)]})
        [True, False, False]
        >>> masked_leaves(lambda params: jax.tree.map(lambda p: p.ndim > 1, params), {"b": jnp.ones(2)})
        [False]
    """
    leaves = jax.tree.leaves(mask)
    if leaves and all(callable(leaf) for leaf in leaves):  # as optax tells them: a model may be callable, too
        mask = mask(params)
    given = dict(jax.tree.leaves_with_path(mask))
    if any(jnp.asarray(leaf).dtype != jnp.bool_ for leaf in given.values() if not isinstance(leaf, bool)):
        raise StructureError("a mask consists of booleans: True for parameters that have weight decay")
    found = []
    for path, _ in jax.tree.leaves_with_path(params):
        above = [path[:i] for i in range(len(path) + 1) if path[:i] in given]
        if not above:
            raise StructureError(
                f"the mask has nothing for parameter {leaf_name(path)}: give a tree like the parameters, a prefix of "
                "it, or a function that makes one of them"
            )
        found.append(given[above[0]])
    return found


def factors_per_element(structure: GradientStructure, factors: Any) -> Factors:
    """The factors in float32 (token ids stay), the tangents at per-element scale.

    Raises:
        ValueError: there are none.
        StructureError: they are not factors of this structure, of any batch size.
    """
    if factors is None:
        raise ValueError(
            "this learned optimizer reads the factors of the gradient: compute them with "
            "value, grads, factors = gmn_lopt.value_grad_and_factors(loss_fn)(params, *args) "
            "and call update(grads, state, params, factors=factors)"
        )
    if not isinstance(factors, Factors):
        raise StructureError(f"factors must be gmn_lopt's Factors, not {type(factors).__name__}")
    structure.check_factors(factors, any_set_size=True)
    ids = structure.token_ids
    return Factors(
        tuple(a if i in ids else jnp.asarray(a, jnp.float32) for i, a in enumerate(factors.activations)),
        tuple(g.shape[0] * jnp.asarray(g, jnp.float32) for g in factors.tangents),
    )


def tied_leaves(structure: GradientStructure) -> tuple[tuple[int, ...], ...]:
    """What the weights of ``UNF`` belong to: the spaces of each leaf, numbered as they come."""
    numbers: dict[int, int] = {}
    return tuple(tuple(numbers.setdefault(s, len(numbers)) for s in p.spaces) for p in structure.parameters)
