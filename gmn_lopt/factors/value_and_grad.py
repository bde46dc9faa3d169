"""Gradients and their rank-1 factors from one backward pass (arXiv:2507.01649, section 3)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array, PyTree

from gmn_lopt.factors.jaxpr.assemble import Traced, assemble
from gmn_lopt.factors.jaxpr.replay import Replay
from gmn_lopt.factors.jaxpr.status import PENALTY
from gmn_lopt.factors.names import leaf_name
from gmn_lopt.factors.parallel import as_in_context, at_scale_of_shard, zeros_like
from gmn_lopt.factors.parts import set_parts
from gmn_lopt.factors.program import Path
from gmn_lopt.factors.spaces import StructureError
from gmn_lopt.factors.structure import Factors, GradientStructure, split_arguments

LossFunction = Callable[..., Any]


def analyze(
    loss_fn: LossFunction, params: PyTree, *args: Any, has_aux: bool = False, strict: bool = False, **kwargs: Any
) -> GradientStructure:
    """Find the gradient structure of a model by analysing the jaxpr of its loss. Nothing is computed.

    Works on any traceable loss: flax.linen, flax.nnx, Haiku, Equinox or plain JAX.

    Args:
        loss_fn: ``loss_fn(params, *args, **kwargs)``, a scalar loss over the batch, or ``(loss, aux)``.
        params: the parameters, a pytree of floating-point arrays or of :class:`jax.ShapeDtypeStruct`.
        *args, **kwargs: the other arguments, of the shapes that training will use.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
        strict: whether a parameter whose factors do not give its whole gradient is an error; a penalty in the loss is
            none.

    Returns:
        The structure; ``print`` it to see layers, neuron spaces, sites and unfactored parameters.

    Raises:
        StructureError: the loss is not a scalar, a parameter is not a floating-point array, the batch has no element,
            or, if ``strict``, some parameter is partial, unused or unfactored.

    Example:
        >>> import gmn_lopt, jax.numpy as jnp
        >>> def loss(params, x):
        ...     return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]) ** 2)
        >>> params = {"b": jnp.ones(4), "v": jnp.ones((4, 2)), "w": jnp.ones((3, 4))}
        >>> print(gmn_lopt.analyze(loss, params, jnp.ones((8, 3))))
        3 of 3 parameters factored, 24 of 24 entries
        2 layers
          ['w'] [3x4] + ['b']: site 0 -> site 1
          ['v'] [4x2]: site 1 -> site 2
        3 neuron spaces
          0: 3 neurons, fixed, in ['w']
          1: 4 neurons, permutable, in ['b'], ['v'] and 1 more
          2: 2 neurons, permutable, in ['v']
        3 sites
          0: 3 neurons of space 0, set of 8, activation
          1: 4 neurons of space 1, set of 8, activation and tangent
          2: 2 neurons of space 2, set of 8, tangent
    """
    structure = _trace(loss_fn, params, args, kwargs, has_aux)[0].structure
    odd = [
        f"{p.name} is {p.status}: {p.reason}"
        for p in structure.parameters
        if p.status != "factored" and not (p.status == "partial" and p.reason == f"also {PENALTY}")
    ]
    if strict and odd:
        raise StructureError(f"{len(odd)} parameters have no complete factors: {'; '.join(odd)}")
    return structure


def value_grad_and_factors(loss_fn: LossFunction, has_aux: bool = False) -> Callable[..., tuple[Any, PyTree, Factors]]:
    """Like :func:`jax.value_and_grad`, with the factors of the gradient from the same backward pass.

    Of a layer ``u = a W + b`` these are the activations ``a`` and the tangents ``g = dL/du`` (arXiv:2507.01649,
    section 3): ``dL/dW = sum_s a_s^T g_s``.

    Works under ``jit``, ``vmap``, ``scan`` and sharding. Arguments that are not arrays (flags, functions) are static.
    Like that, it traces the loss at each call outside ``jit``, and analyses it, which takes as long again: use ``jit``.

    Args:
        loss_fn: ``loss_fn(params, *args, **kwargs)``, a traceable scalar loss over the batch, or ``(loss, aux)``.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.

    Returns:
        ``f(params, *args, **kwargs) -> (value, grads, factors)``; ``value`` is ``(loss, aux)`` if ``has_aux``.
        Activations are ``[S, d_in]`` and tangents ``[S, d_out]``, at the scale of the batch loss
        (:class:`gmn_lopt.Factors`).

    Raises:
        StructureError: when called, as :func:`analyze` does.

    Example:
        >>> import gmn_lopt, jax.numpy as jnp
        >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
        >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> value, grads, factors = gmn_lopt.value_grad_and_factors(loss)({"w": jnp.ones((2, 1))}, x)
        >>> factors.tangents[0]
        Array([[1.],
               [3.]], dtype=float32)
        >>> bool((factors.activations[0].T @ factors.tangents[0] == grads["w"]).all())
        True
    """

    def wrapped(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree, Factors]:
        # Traced at each call, as jax.value_and_grad is: the loss may read what has changed outside of it.
        traced, out_tree = _trace(loss_fn, params, args, kwargs, has_aux)
        leaves, treedef = jax.tree.flatten(params)
        dynamic, _ = split_arguments((args, kwargs))
        loss, aux, grads, factors = _differentiate(traced, out_tree, leaves, range(len(leaves)), dynamic)
        return ((loss, aux) if has_aux else loss), jax.tree.unflatten(treedef, grads), factors

    return wrapped


def factors_and_remainder(loss_fn: LossFunction, params: PyTree, *args: Any) -> tuple[Factors, dict[int, Array]]:
    """The factors of a gradient, and the gradients of the leaves that they do not give whole, by index.

    One backward pass, in which no gradient of a factored leaf is built. Raises as :func:`analyze` does.
    """
    traced, out_tree = _trace(loss_fn, params, args, {}, False)
    rest = [i for i, p in enumerate(traced.structure.parameters) if p.status not in ("factored", "unused")]
    dynamic, _ = split_arguments((args, {}))
    _, _, grads, factors = _differentiate(traced, out_tree, jax.tree.leaves(params), rest, dynamic)
    return factors, dict(zip(rest, grads))


def _differentiate(
    traced: Traced, out_tree: Any, leaves: Sequence[Any], wanted: Sequence[int], dynamic: Sequence[Any]
) -> tuple[Array, Any, list[Array], Factors]:
    """The loss, what comes with it, the gradients of the wanted leaves, and the factors."""
    leaves = [jnp.asarray(leaf) for leaf in leaves]

    def tapped(given: list[Array], perturbations: dict[Path, Array]) -> tuple[Array, Any]:
        run = Replay(traced.taps, perturbations)
        filled = list(leaves)
        for i, leaf in zip(wanted, given):
            filled[i] = leaf
        outputs = run.jaxpr(traced.closed.jaxpr, traced.closed.consts, [*filled, *dynamic], ())
        loss, aux = jax.tree.unflatten(out_tree, outputs)
        return loss, (aux, {i: as_in_context(activation) for i, activation in run.recorded.items()})

    perturbations = {path: zeros_like(*of) for path, of in traced.perturbed.items()}
    differentiate = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=True)
    (loss, (aux, recorded)), (grads, tangents) = differentiate([leaves[i] for i in wanted], perturbations)
    tangents = {path: at_scale_of_shard(tangent, loss, leaves) for path, tangent in tangents.items()}
    factors = Factors(
        tuple(read.canonical(recorded) for read in traced.reads),
        tuple(write.canonical(tangents) for write in traced.writes),
        traced.without_batch,
        set_parts(traced.structure),
    )
    return loss, aux, grads, factors


def value_grad_and_extra(loss_fn: Callable[..., Any], needs_factors: bool) -> Callable[..., Any]:
    """``compute(params, *args) -> (value, grads, extra)`` of a scalar loss.

    ``extra`` are the extra arguments of an optimizer's ``update``: ``{"factors": ...}`` if it needs them, or none.
    """

    def compute(params: PyTree, *args: Any) -> tuple[Any, PyTree, dict[str, Any]]:
        if not needs_factors:
            return *jax.value_and_grad(loss_fn)(params, *args), {}
        value, grads, factors = value_grad_and_factors(loss_fn)(params, *args)
        return value, grads, {"factors": factors}

    return compute


def _trace(
    loss_fn: LossFunction, params: PyTree, args: Sequence[Any], kwargs: Mapping[str, Any], has_aux: bool
) -> tuple[Traced, Any]:
    """Trace and analyse; also returns the tree of the outputs ``(loss, aux)``."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [leaf_name(path) for path, _ in paths]
    for name, (_, leaf) in zip(names, paths):
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise StructureError(
                f"parameter {name} is {kind}, not a floating-point array; keep only trainable arrays in params "
                "(for Equinox: eqx.partition(model, eqx.is_inexact_array))"
            )
    dynamic, merge = split_arguments((args, dict(kwargs)))
    out_tree = None

    def flat(leaves: list[Array], dynamic: list[Array]) -> list[Array]:
        nonlocal out_tree
        args, kwargs = merge(dynamic)
        result = loss_fn(jax.tree.unflatten(treedef, leaves), *args, **kwargs)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise StructureError("with has_aux=True the loss function must return a pair (loss, aux)")
        loss, aux = result if has_aux else (result, None)
        if isinstance(loss, tuple):
            raise StructureError("the loss function returned a tuple; pass has_aux=True for (loss, aux)")
        shape, dtype = jnp.shape(loss), jnp.result_type(loss)
        if shape != () or not jnp.issubdtype(dtype, jnp.floating):
            raise StructureError(f"the loss must be a floating-point scalar, but it is {dtype}{list(shape)}")
        outputs, out_tree = jax.tree.flatten((loss, aux))
        return outputs

    leaves = [leaf for _, leaf in paths]
    closed: ClosedJaxpr = jax.make_jaxpr(flat)(leaves, dynamic)
    traced = assemble(closed, names, [str(leaf.dtype) for leaf in leaves], treedef)
    structure = traced.structure
    shapes = *structure.activation_shapes, *structure.tangent_shapes
    # JAX drops what is computed from nothing: the loss may not depend on any parameter then.
    unused = all(p.status == "unused" for p in structure.parameters) and any(0 in jnp.shape(x) for x in dynamic)
    if unused or any(shape[0] == 0 for shape in shapes):
        raise StructureError("the batch has no element, so that there is no gradient: leave empty batches out")
    return traced, out_tree
