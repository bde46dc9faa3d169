"""Gradients and their rank-1 factors from one backward pass (arXiv:2507.01649, section 3)."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array, PyTree

from gmn_lopt.factors.jaxpr import Path, Tap, Traced, assemble
from gmn_lopt.factors.jaxpr.program import CALLS, scan_parts
from gmn_lopt.factors.structure import Factors, GradientStructure, StructureError
from gmn_lopt.factors.table import describe

LossFunction = Callable[..., Any]


def analyze(
    loss_fn: LossFunction, params: PyTree, *args: Any, has_aux: bool = False, strict: bool = False
) -> GradientStructure:
    """Find the gradient structure of a model by analysing the jaxpr of its loss. Nothing is computed.

    Works on any traceable loss: flax.linen, flax.nnx, Haiku, Equinox or plain JAX.

    Args:
        loss_fn: ``loss_fn(params, *args)``, a scalar loss over the batch, or ``(loss, aux)``.
        params: the parameters, a pytree of floating-point arrays or of :class:`jax.ShapeDtypeStruct`.
        *args: the other arguments, of the shapes that training will use.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
        strict: whether a parameter whose factors do not give its whole gradient is an error.

    Returns:
        The structure; ``print`` it to see layers, neuron spaces, sites and unfactored parameters.

    Raises:
        StructureError: the loss is not a scalar, a parameter is not a floating-point array, or, if ``strict``, some
            parameter is partial, unused or unfactored.
    """
    structure = _trace(loss_fn, params, args, has_aux)[0].structure
    odd = [describe(parameter) for parameter in structure.parameters if parameter.status != "factored"]
    if strict and odd:
        raise StructureError(f"{len(odd)} parameters have no complete factors: {'; '.join(odd)}")
    return structure


def value_grad_and_factors(loss_fn: LossFunction, has_aux: bool = False) -> Callable[..., tuple[Any, PyTree, Factors]]:
    """Like :func:`jax.value_and_grad`, with the factors of the gradient from the same backward pass.

    Works under ``jit``, ``vmap``, ``scan`` and sharding. Arguments that are not arrays (flags, functions) are static.
    Called outside ``jit`` it analyses the loss once for each combination of shapes and static arguments.

    Args:
        loss_fn: ``loss_fn(params, *args)``, a traceable scalar loss over the batch, or ``(loss, aux)``.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.

    Returns:
        ``f(params, *args) -> (value, grads, factors)``; ``value`` is ``(loss, aux)`` if ``has_aux``. Activations are
        ``[S, d_in]`` and tangents ``[S, d_out]``, at the scale of the batch loss. It raises StructureError as
        :func:`analyze` does.
    """
    cache: OrderedDict[Any, tuple[Traced, Any]] = OrderedDict()

    def wrapped(params: PyTree, *args: Any) -> tuple[Any, PyTree, Factors]:
        key = _cache_key(params, args)
        if key not in cache:
            cache[key] = _trace(loss_fn, params, args, has_aux)
            while len(cache) > 64:
                cache.popitem(last=False)
        traced, out_tree = cache[key]
        leaves, treedef = jax.tree.flatten(params)
        dynamic = _split(args)[0]

        def tapped(leaves: list[Array], perturbations: list[Array]) -> tuple[Array, Any]:
            run = _Run(traced.taps, dict(enumerate(perturbations)))
            outputs = run.jaxpr(traced.closed.jaxpr, traced.closed.consts, [*leaves, *dynamic], ())
            loss, aux = jax.tree.unflatten(out_tree, outputs)
            return loss, (aux, run.recorded)

        zeros = [jnp.zeros(layout.shape, dtype) for layout, dtype in zip(traced.tangent_layouts, traced.tangent_dtypes)]
        differentiate = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=True)
        (loss, (aux, recorded)), (grads, tangents) = differentiate([jnp.asarray(leaf) for leaf in leaves], zeros)
        factors = Factors(
            tuple(layout.canonical(recorded[i]) for i, layout in enumerate(traced.activation_layouts)),
            tuple(layout.canonical(tangent) for layout, tangent in zip(traced.tangent_layouts, tangents)),
        )
        return ((loss, aux) if has_aux else loss), jax.tree.unflatten(treedef, grads), factors

    return wrapped


class _Run:
    """One evaluation of the loss with its layers tapped."""

    def __init__(self, taps: dict[Path, Tap], perturbations: dict[int, Array]):
        self.taps = taps
        self.perturbations = perturbations
        self.recorded: dict[int, Array] = {}
        self.inside = {path[:i] for path in taps for i in range(1, len(path))}

    def jaxpr(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], path: Path) -> list[Any]:
        """Evaluate a jaxpr; calls with taps inside are entered, all others are bound as they are."""
        environment = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else environment[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            inputs = [read(atom) for atom in eqn.invars]
            here = (*path, index)
            with eqn.ctx.manager:
                if here in self.inside:
                    outputs = self._enter(eqn, inputs, here)
                else:
                    result = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
                    outputs = result if eqn.primitive.multiple_results else [result]
            if here in self.taps:
                outputs = [self._tap(here, inputs, outputs[0])]
            environment.update(zip(eqn.outvars, outputs))
        return [read(atom) for atom in jaxpr.outvars]

    def _tap(self, here: Path, inputs: list[Any], output: Array) -> Array:
        tap = self.taps[here]
        if tap.activation is not None:
            read = inputs[1 - tap.side]
            self.recorded[tap.activation] = read if tap.column is None else read[..., tap.column, None]
        return output if tap.tangent is None else output + self.perturbations[tap.tangent]

    def _enter(self, eqn: Any, inputs: list[Any], path: Path) -> list[Any]:
        # Perturbations go into loops and rematerialised regions and activations come out: inside stays pure.
        taps = {at: tap for at, tap in self.taps.items() if at[: len(path)] == path}
        tangents = [tap.tangent for tap in taps.values() if tap.tangent is not None]
        perturbations = {tangent: self.perturbations[tangent] for tangent in tangents}
        if eqn.primitive.name == "scan":
            return self._scan(eqn, inputs, path, taps, perturbations)
        jaxpr, consts = CALLS[eqn.primitive.name].body(eqn.params)
        if eqn.primitive.name not in ("remat2", "checkpoint"):
            return self.jaxpr(jaxpr, consts, inputs, path)

        def region(inputs: list[Any], perturbations: dict[int, Array]) -> tuple[list[Any], dict[int, Array]]:
            inner = _Run(taps, perturbations)
            return inner.jaxpr(jaxpr, consts, inputs, path), inner.recorded

        policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
        outputs, recorded = jax.checkpoint(region, policy=policy, prevent_cse=prevent_cse)(inputs, perturbations)
        self.recorded.update(recorded)
        return outputs

    def _scan(
        self, eqn: Any, inputs: list[Any], path: Path, taps: dict[Path, Tap], perturbations: dict[int, Array]
    ) -> list[Any]:
        """A loop: slices of the perturbations are scanned over, and the activations are stacked."""
        params = eqn.params
        closed: ClosedJaxpr = params["jaxpr"]
        constants, first, scanned = scan_parts(params, inputs)

        def body(carry: list[Any], slices: tuple[list[Any], dict[int, Array]]) -> tuple[list[Any], Any]:
            inner = _Run(taps, slices[1])
            outputs = inner.jaxpr(closed.jaxpr, closed.consts, [*constants, *carry, *slices[0]], path)
            return outputs[: len(carry)], (outputs[len(carry) :], inner.recorded)

        carry, (stacked, recorded) = jax.lax.scan(
            body,
            first,
            (scanned, perturbations),
            **{name: params[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in params},
        )
        self.recorded.update(recorded)
        return [*carry, *stacked]


def _is_dynamic(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | float | complex | jax.ShapeDtypeStruct)


def _split(args: Sequence[Any]) -> tuple[list[Any], Callable[[Sequence[Any]], Any], Any]:
    """Arrays among the leaves of the arguments; how to put arrays back; a key for the rest."""
    leaves, treedef = jax.tree.flatten(args)
    dynamic = [leaf for leaf in leaves if _is_dynamic(leaf)]
    static = tuple((i, leaf) for i, leaf in enumerate(leaves) if not _is_dynamic(leaf))

    def merge(values: Sequence[Any]) -> Any:
        rest = iter(values)
        fixed = dict(static)
        return jax.tree.unflatten(treedef, [fixed[i] if i in fixed else next(rest) for i in range(len(leaves))])

    return dynamic, merge, (treedef, static)


def _cache_key(params: PyTree, args: Sequence[Any]) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    dynamic, _, (args_treedef, static) = _split(args)
    types = tuple(jax.typeof(leaf) for leaf in [*leaves, *dynamic])
    identities = tuple((i, type(leaf), leaf if _hashable(leaf) else id(leaf)) for i, leaf in static)
    return treedef, args_treedef, types, identities


def _hashable(leaf: Any) -> bool:
    try:
        hash(leaf)
    except TypeError:
        return False
    return True


def _trace(loss_fn: LossFunction, params: PyTree, args: Sequence[Any], has_aux: bool) -> tuple[Traced, Any]:
    """Trace and analyse; also returns the tree of the outputs ``(loss, aux)``."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    for name, (_, leaf) in zip(names, paths):
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise StructureError(
                f"parameter {name} is {kind}, not a floating-point array; keep only trainable arrays in params "
                "(for Equinox: eqx.partition(model, eqx.is_inexact_array))"
            )
    dynamic, merge, _ = _split(args)
    out_tree = None

    def flat(leaves: list[Array], dynamic: list[Array]) -> list[Array]:
        nonlocal out_tree
        result = loss_fn(jax.tree.unflatten(treedef, leaves), *merge(dynamic))
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
    return assemble(closed, names, [str(leaf.dtype) for leaf in leaves], treedef), out_tree


def value_grad_and_extra(loss_fn: Callable[..., Any], needs_factors: bool) -> Callable[..., Any]:
    """Value, gradient and the extra arguments of an optimizer's ``update``: ``{"factors": ...}``, or none.

    Args:
        loss_fn: ``loss_fn(params, *args)``, a scalar.
        needs_factors: whether the optimizer needs the factors.

    Returns:
        ``compute(params, *args) -> (value, grads, extra)``.
    """

    def compute(params: PyTree, *args: Any) -> tuple[Any, PyTree, dict[str, Any]]:
        if not needs_factors:
            return *jax.value_and_grad(loss_fn)(params, *args), {}
        value, grads, factors = value_grad_and_factors(loss_fn)(params, *args)
        return value, grads, {"factors": factors}

    return compute
