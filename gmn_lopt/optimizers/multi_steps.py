"""Gradient accumulation that keeps the factors: what ``optax.MultiSteps`` does with gradients, for both."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from gmn_lopt.factors.parallel import leave_to_compiler
from gmn_lopt.factors.parts import set_parts
from gmn_lopt.factors.structure import Factors, GradientStructure, StructureError, split_arguments


class MultiStepsState(NamedTuple):
    """State of :func:`multi_steps`, a pytree of arrays.

    Attributes:
        mini_step: number of micro-batches since the last update; 0 right after it.
        gradient_step: number of updates.
        inner_opt_state: of the optimizer.
        acc_grads: mean of the gradients since the last update, float32, shaped like the parameters.
        activations, tangents: the factors since the last update, in the shapes of the whole batch's, and zeros where
            those of later micro-batches will be; float32, token ids int32.
    """

    mini_step: Int[Array, ""]
    gradient_step: Int[Array, ""]
    inner_opt_state: PyTree
    acc_grads: PyTree
    activations: tuple[Array, ...]
    tangents: tuple[Array, ...]


def multi_steps(
    tx: optax.GradientTransformation, every_k: int, structure: GradientStructure
) -> optax.GradientTransformationExtraArgs:
    """Take one step for every ``every_k`` micro-batches, with the gradient and the factors of all of them.

    The step is that of one batch that consists of the micro-batches, for a loss that is a mean over the batch.
    ``optax.MultiSteps`` hands on the factors of the last micro-batch only. In between, updates are zero and ``tx`` is
    not called. The state holds the factors of the whole batch, float32: ``S (d_in + d_out)`` numbers for each layer.

    Args:
        tx: the optimizer, or a chain; what else it takes beside ``factors`` is what the last micro-batch came with.
        every_k: number of micro-batches for each step, all of one size.
        structure: of the loss of the *whole* batch, from :func:`gmn_lopt.analyze`; shapes are enough for that
            (:class:`jax.ShapeDtypeStruct`).

    Returns:
        The transformation. Its ``update`` takes the ``factors`` of a micro-batch, and raises :class:`StructureError`
        where ``every_k`` of them are not those of the structure, and ``ValueError`` without.

    Raises:
        ValueError: ``every_k`` is no whole number of at least one.

    Example:
        >>> loss = lambda params, x: jnp.mean((jnp.tanh(x @ params["w"]) - 1.0) ** 2)
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((8, 3))
        >>> structure = gmn_lopt.analyze(loss, params, x)
        >>> tx = gmn_lopt.multi_steps(gmn_lopt.load("default", structure), 2, structure)
        >>> state = tx.init(params)
        >>> for half in jnp.split(x, 2):
        ...     value, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, half)
        ...     updates, state = tx.update(grads, state, params, factors=factors)
        ...     bool(jnp.any(updates["w"] != 0)), int(state.gradient_step)
        (False, 0)
        (True, 1)
    """
    if isinstance(every_k, bool) or not isinstance(every_k, int) or every_k < 1:
        raise ValueError(f"every_k must be a whole number of at least 1, not {every_k!r}")
    inner, parts = optax.with_extra_args_support(tx), set_parts(structure)

    def init(params: PyTree) -> MultiStepsState:
        ids = structure.token_ids
        activations = tuple(
            jnp.zeros(shape, jnp.int32 if i in ids else jnp.float32)
            for i, shape in enumerate(structure.activation_shapes)
        )
        tangents = tuple(jnp.zeros(shape, jnp.float32) for shape in structure.tangent_shapes)
        grads = optax.tree.zeros_like(params, dtype=jnp.float32)
        mini_step, gradient_step = (jnp.zeros((), jnp.int32) for _ in range(2))
        return MultiStepsState(mini_step, gradient_step, inner.init(params), grads, activations, tangents)

    def update(
        updates: PyTree, state: MultiStepsState, params: PyTree | None = None, *, factors: Any = None, **extra: Any
    ) -> tuple[PyTree, MultiStepsState]:
        _check(structure, every_k, factors)
        arrays, merge = split_arguments(extra)  # the others are no arguments of what is compiled
        return leave_to_compiler(partial(advance, merge), (updates, state), updates, state, params, factors, arrays)

    def advance(
        merge: Callable[[Sequence[Any]], dict[str, Any]],
        updates: PyTree,
        state: MultiStepsState,
        params: PyTree | None,
        factors: Factors,
        arrays: Sequence[Any],
    ) -> tuple[PyTree, MultiStepsState]:
        acc_grads = jax.tree.map(
            lambda acc, g: acc + (g.astype(acc.dtype) - acc) / (state.mini_step + 1), state.acc_grads, updates
        )
        joined = _join(state, factors, every_k, parts)

        def step() -> tuple[PyTree, PyTree]:
            return inner.update(
                optax.tree.cast_like(acc_grads, updates), state.inner_opt_state, params, factors=joined, **merge(arrays)
            )

        def wait() -> tuple[PyTree, PyTree]:
            return jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: step()[0])
            ), state.inner_opt_state

        emit = state.mini_step == every_k - 1
        new_updates, inner_state = jax.lax.cond(emit, step, wait)
        grads, activations, tangents = jax.tree.map(
            lambda x: jnp.where(emit, jnp.zeros_like(x), x), (acc_grads, joined.activations, joined.tangents)
        )
        mini_step = jnp.where(emit, 0, state.mini_step + 1)
        gradient_step = jnp.where(emit, optax.safe_increment(state.gradient_step), state.gradient_step)
        return new_updates, MultiStepsState(mini_step, gradient_step, inner_state, grads, activations, tangents)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(structure: GradientStructure, every_k: int, factors: Any) -> None:
    """Raise an error unless the factors are those of a micro-batch, ``every_k`` of which make the structure's batch."""
    if factors is None:
        raise ValueError("multi_steps keeps the factors of each micro-batch: call update(..., factors=factors)")
    if not isinstance(factors, Factors):
        raise StructureError(f"factors must be gmn_lopt's Factors, not {type(factors).__name__}")
    structure.check_factors(factors, any_set_size=True)
    shapes = (*structure.activation_shapes, *structure.tangent_shapes)
    for i, (x, (size, _)) in enumerate(zip((*factors.activations, *factors.tangents), shapes, strict=True)):
        times = 1 if i in factors.without_batch else every_k
        if times * x.shape[0] != size:
            raise StructureError(
                f"a micro-batch has sets of {x.shape[0]} elements, but {every_k} of them shall make {size}: analyse "
                "the loss with the whole batch, and give micro-batches of one size"
            )


def _join(state: MultiStepsState, factors: Factors, every_k: int, parts: Sequence[Sequence[int]]) -> Factors:
    """The factors so far with those of a micro-batch, at the scale of the whole batch's loss.

    Sets lie one after the other, within each of their parts. Sets that do not come from the batch are the same in each
    micro-batch: of their tangents the mean is taken.
    """
    first, leaves = len(factors.activations), [*state.activations, *state.tangents]
    for i, (kept, new) in enumerate(zip(leaves, (*factors.activations, *factors.tangents), strict=True)):
        added = new.astype(kept.dtype)
        if i >= first:
            added = added / every_k
        if i in factors.without_batch:
            leaves[i] = added if i < first else kept + added
            continue
        for start, stop in itertools.pairwise(parts[i] if parts else (0, len(kept))):
            part, size = added[start // every_k : stop // every_k], (stop - start) // every_k
            kept = jax.lax.dynamic_update_slice_in_dim(kept, part, start + state.mini_step * size, 0)
        leaves[i] = kept
    return Factors(tuple(leaves[:first]), tuple(leaves[first:]), factors.without_batch)
