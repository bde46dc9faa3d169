"""The gradient structure of a model: what GradMetaNet has to know about it, static and hashable.

A structure is found by :func:`gmn_lopt.analyze`; this file only says what it consists of and how it prints.
"""

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gmn_lopt.factors.kinds import LayerKind
from gmn_lopt.factors.spaces import Parameter, Site, Space, StructureError

WIDTH = 120  # of the printed structure


@dataclass(frozen=True)
class Layer:
    """One linear map ``u = a W + b`` of the model; of layers that are stacked and scanned over, the whole stack.

    Attributes:
        kind: what kind of layer it is (:mod:`gmn_lopt.factors.kinds`).
        kernel: index into ``GradientStructure.parameters``; None if no parameter is the kernel, entry by entry, as of a
            product of two.
        bias: index into ``GradientStructure.parameters``, or None; also None where some uses have another.
        activation: index into ``Factors.activations``.
        tangent: index into ``Factors.tangents``.
        leaves: indices of all parameters that its kernel is computed from.
        direct: whether the kernel is the parameter, but for rearrangements.
        unbiased: elements ``(start, stop)`` of the set to which the bias is not added: of several uses of a kernel some
            may do without, as those by which a derivative in the input flows.
        gradients: ``(activation, tangent) -> parts of the gradient``; not part of the comparison of structures.

    Example:
        >>> import gmn_lopt, jax.numpy as jnp
        >>> model = lambda w, x: jnp.sum(jnp.tanh(x @ w))
        >>> structure = gmn_lopt.analyze(model, jnp.ones((2, 3)), jnp.ones((4, 2)))
        >>> [(layer.kernel, layer.bias, layer.activation, layer.tangent) for layer in structure.layers]
        [(0, None, 0, 0)]
    """

    kind: LayerKind
    kernel: int | None
    bias: int | None
    activation: int
    tangent: int
    leaves: tuple[int, ...] = ()
    direct: bool = False
    unbiased: tuple[tuple[int, int], ...] = ()
    gradients: Callable[[Array, Array], Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Derived:
    """How kernels and biases are computed from parameters where they are not simply parameters.

    Attributes:
        compute: ``(leaves, other arrays that the loss was given) -> {place: kernel or bias}``.
        constant: whether that is linear in the parameters and depends on nothing else but constants.
        leaves: shapes and dtypes of the parameters.
        others: those of the other arrays.
    """

    compute: Callable[[list[Array], list[Array]], dict[Hashable, Array]]
    constant: bool
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    others: tuple[jax.ShapeDtypeStruct, ...]

    def pull_back(
        self, gradients: dict[Hashable, Array], leaves: Sequence[Array] | None, others: Sequence[Array]
    ) -> list[Array]:
        """The gradient of the parameters, given those of the kernels and biases."""
        if leaves is None:
            if not self.constant:
                raise StructureError(
                    "some kernels are computed from parameters: call reconstruct(factors, params, *args) with the "
                    "arguments of the loss"
                )
            leaves, others = ([jnp.zeros(x.shape, x.dtype) for x in of] for of in (self.leaves, self.others))
        for given, expected in ((leaves, self.leaves), (others, self.others)):
            if [jnp.shape(x) for x in given] != [x.shape for x in expected]:
                raise StructureError("the arguments are not of the shapes that the loss was analysed with")

        def derive(leaves: list[Array]) -> dict[Hashable, Array]:
            computed = self.compute(leaves, list(others))
            return {place: computed[place] for place in gradients}

        found: list[Array] = jax.vjp(derive, list(leaves))[1](gradients)[0]
        return found


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """The rank-1 factors of a gradient, at the scale of the batch loss (a pytree).

    For a layer ``u = a W + b`` with activations ``a: [S, d_in]`` and tangents ``g = dL/du: [S, d_out]``,
    ``dL/dW = a^T g`` and ``dL/db = sum_s g_s`` (arXiv:2507.01649, section 3).

    Attributes:
        activations: one array ``[S, d_in]`` for each distinct activation that a layer reads; for an embedding, the
            token ids, integers ``[S, 1]``.
        tangents: one array ``[S, d_out]`` for each distinct tangent at the output of a layer.
        without_batch: places among the leaves, activations first, of those whose set does not come from the batch, such
            as the rows of a table of positions (static).
        parts: of each leaf where the parts of its set begin and where the last one ends, if some of the uses of a
            kernel do without its bias; else empty (static).

    Example:
        Two layers that read the same array share its activation; the set is the batch, of 5.

        >>> import gmn_lopt, jax.numpy as jnp
        >>> loss = lambda params, x: jnp.mean(jnp.tanh(x @ params["a"]) * (x @ params["b"]))
        >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))}
        >>> _, _, factors = gmn_lopt.value_grad_and_factors(loss)(params, jnp.ones((5, 2)))
        >>> [a.shape for a in factors.activations], [g.shape for g in factors.tangents]
        ([(5, 2)], [(5, 3), (5, 3)])
    """

    activations: tuple[jax.Array, ...]
    tangents: tuple[jax.Array, ...]
    without_batch: tuple[int, ...] = field(default=(), metadata={"static": True})
    parts: tuple[tuple[int, ...], ...] = field(default=(), metadata={"static": True})


@dataclass(frozen=True)
class GradientStructure:
    """Layers, neuron spaces, sites and parameters of a model, as :func:`gmn_lopt.analyze` finds them.

    Static and hashable: it can be a static argument of :func:`jax.jit`. Two analyses of equal models are equal.

    Attributes:
        spaces: the neuron spaces.
        sites: the sites, in program order.
        parameters: one entry for each leaf of the parameters, in the order of :func:`jax.tree.leaves`.
        layers: the layers, in program order.
        treedef: the tree structure of the parameters.
        activation_shapes: shapes ``[S, d]`` of ``Factors.activations``.
        tangent_shapes: shapes ``[S, d]`` of ``Factors.tangents``.
        derived: how kernels are computed that are not simply parameters; not part of the comparison of structures.

    Example:
        >>> import gmn_lopt, jax.numpy as jnp
        >>> model = lambda w, x: jnp.sum(jnp.tanh(x @ w))
        >>> structure = gmn_lopt.analyze(model, jnp.ones((2, 3)), jnp.ones((4, 2)))
        >>> len(structure.layers), len(structure.spaces), len(structure.sites)
        (1, 2, 2)
        >>> print(structure)  # doctest: +ELLIPSIS
        1 of 1 parameters factored, 6 of 6 entries
        1 layers
        ...
    """

    spaces: tuple[Space, ...]
    sites: tuple[Site, ...]
    parameters: tuple[Parameter, ...]
    layers: tuple[Layer, ...]
    treedef: jax.tree_util.PyTreeDef
    activation_shapes: tuple[tuple[int, int], ...]
    tangent_shapes: tuple[tuple[int, int], ...]
    derived: Derived | None = field(default=None, compare=False, repr=False)

    @property
    def token_ids(self) -> frozenset[int]:
        """Indices of the activations that are at no site: token ids, integers ``[S, 1]`` read by embeddings."""
        return frozenset(layer.activation for layer in self.layers if not layer.kind.reads_neurons)

    def is_permutable(self, site: Site) -> bool:
        """Whether any neurons of a site may be permuted; otherwise it is fixed throughout, like the logits."""
        return any(self.spaces[space].permutable for space in site.spaces)

    def reconstruct(self, factors: Factors, params: PyTree | None = None, *args: Any, **kwargs: Any) -> PyTree:
        """Dense gradients from factors: the sum of the outer products of each parameter's layers.

        Args:
            factors: what :func:`gmn_lopt.value_grad_and_factors` returned for this structure.
            params, *args, **kwargs: what the loss was given. Needed only where a kernel is computed from parameters,
                as by weight normalisation: its gradient is pulled back to them.

        Returns:
            A tree like the parameters: what the factors give of each gradient. That is the whole gradient of a factored
            parameter, a part of that of a partial one, and zeros for all others.

        Raises:
            StructureError: factors or arguments have other shapes than the structure, or arguments are missing.

        Example:
            >>> import gmn_lopt, jax, jax.numpy as jnp
            >>> def loss(params, x):
            ...     return jnp.mean((x @ params["w"] * params["scale"]) ** 2)
            >>> params, x = {"scale": jnp.ones(3), "w": jnp.ones((2, 3))}, jnp.ones((5, 2))
            >>> _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, x)
            >>> rebuilt = gmn_lopt.analyze(loss, params, x).reconstruct(factors)
            >>> jax.tree.map(lambda a, b: bool(jnp.allclose(a, b)), rebuilt, grads)
            {'scale': False, 'w': True}
        """
        self.check_factors(factors)
        gradients = [jnp.zeros(p.shape, p.dtype) for p in self.parameters]
        derived: dict[Hashable, Array] = {}
        for layer in self.layers:
            assert layer.gradients is not None
            parts = layer.gradients(factors.activations[layer.activation], factors.tangents[layer.tangent])
            for leaf, gradient in parts.leaves.items():
                gradients[leaf] = gradients[leaf] + gradient
            for place, gradient in parts.derived.items():
                derived[place] = derived[place] + gradient if place in derived else gradient
        if derived:
            assert self.derived is not None
            leaves = None if params is None else jax.tree.leaves(params)
            through = self.derived.pull_back(derived, leaves, split_arguments((args, kwargs))[0])
            gradients = [a + b for a, b in zip(gradients, through)]
        return jax.tree.unflatten(self.treedef, gradients)

    def check_factors(self, factors: Factors, any_set_size: bool = False) -> None:
        """Raise a StructureError unless the factors have the shapes of this structure.

        Args:
            factors: the factors.
            any_set_size: whether their sets may have other sizes, such as those of a batch of another size; sets that
                were of one size must still be.

        Raises:
            StructureError: they have not; the message says which and what to do.
        """
        sizes: dict[int, int] = {}
        for kind, shapes in (("activations", self.activation_shapes), ("tangents", self.tangent_shapes)):
            arrays = getattr(factors, kind)
            if len(arrays) != len(shapes):
                raise StructureError(
                    f"factors.{kind} holds {len(arrays)} arrays, but {len(shapes)} in the analysed model; "
                    "take factors from value_grad_and_factors of the loss that was analysed"
                )
            for i, (array, (set_size, size)) in enumerate(zip(arrays, shapes)):
                if len(array.shape) != 2 or array.shape[1] != size:
                    raise StructureError(
                        f"factors.{kind}[{i}] has shape {array.shape}, but {(set_size, size)} in the analysed model; "
                        "take factors from value_grad_and_factors of the loss that was analysed"
                    )
                if array.shape[0] != (sizes.setdefault(set_size, array.shape[0]) if any_set_size else set_size):
                    raise StructureError(
                        f"factors.{kind}[{i}] has a set of {array.shape[0]} elements, but {set_size} when the model "
                        "was analysed; analyse the loss with a batch of this size"
                    )

    def __str__(self) -> str:
        """A summary, with every parameter whose factors do not give its whole gradient; then layers, spaces, sites.

        Of layers that differ in the numbers in their names only, the first is shown.
        """
        names = [parameter.name for parameter in self.parameters]
        used = [[names[p] for p, of in enumerate(self.parameters) if i in of.spaces] for i in range(len(self.spaces))]
        layers = [_describe_layer(self, layer) for layer in self.layers]
        spaces = [_describe_space(i, space, used[i]) for i, space in enumerate(self.spaces)]
        sites = [_describe_site(self, i, site) for i, site in enumerate(self.sites)]
        return "\n".join(
            [
                *_describe_factored(self.parameters),
                f"{len(layers)} layers",
                *_collapse(layers),
                f"{len(spaces)} neuron spaces",
                *_collapse(spaces),
                f"{len(sites)} sites",
                *_collapse(sites),
            ]
        )


def split_arguments(args: PyTree) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Arrays among the leaves of the arguments; how to put arrays back among the rest."""
    leaves, treedef = jax.tree.flatten(args)
    arrays = jax.Array | np.ndarray | np.generic | float | complex | jax.ShapeDtypeStruct
    static = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, arrays)}

    def merge(values: Sequence[Any]) -> Any:
        rest = iter(values)
        return jax.tree.unflatten(treedef, [static[i] if i in static else next(rest) for i in range(len(leaves))])

    return [leaf for i, leaf in enumerate(leaves) if i not in static], merge


def _describe_factored(parameters: Sequence[Parameter]) -> list[str]:
    """How much of the parameters is factored, and what is not, with the reasons."""
    factored = [p for p in parameters if p.status == "factored"]
    entries, total = sum(p.size for p in factored), sum(p.size for p in parameters)
    lines = [f"{len(factored)} of {len(parameters)} parameters factored, {entries:,} of {total:,} entries"]
    odd: dict[tuple[str, str], list[str]] = {}
    for parameter in parameters:
        if parameter.status != "factored":
            odd.setdefault((parameter.status, parameter.reason), []).append(parameter.name)
    for (status, reason), names in odd.items():
        lines += list_alike(names, f" {'is' if len(names) == 1 else 'are'} {status}: {reason}")
    return lines


def list_alike(names: Sequence[str], after: str = "") -> list[str]:
    """Names and what is to be said of them as lines to print; those that differ in numbers only are counted."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(_pattern(name), name)
    count = Counter(map(_pattern, names))
    shown = [n if count[pattern] == 1 else f"{n} and {count[pattern] - 1} like it" for pattern, n in first.items()]
    text = ", ".join(shown) + after
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False)


def _describe_layer(structure: GradientStructure, layer: Layer) -> tuple[str, Hashable]:
    """A line, and what it has in common with the lines of layers like it."""
    names = [parameter.name for parameter in structure.parameters]
    bias = "" if layer.bias is None else f" + {names[layer.bias]}"
    sites = (f"site {i}" for i, site in enumerate(structure.sites) if site.activation == layer.activation)
    reads = next(sites, "token ids")
    writes = next(i for i, site in enumerate(structure.sites) if site.tangent == layer.tangent)
    if layer.kernel is None:
        kernel = f"a function of {_shorten([names[leaf] for leaf in layer.leaves])}"
    else:
        kernel = f"{names[layer.kernel]} [{'x'.join(map(str, structure.parameters[layer.kernel].shape))}]"
    return f"{kernel}{bias}: {reads} -> site {writes}", _pattern(kernel + bias)


def _describe_space(index: int, space: Space, users: Sequence[str]) -> tuple[str, Hashable]:
    kind = "permutable" if space.permutable else "fixed"
    each = f" in each of space {' x '.join(map(str, space.stack))} by itself" if space.stack else ""
    line = f"{index}: {space.size} neurons, {kind}{each}, in {_shorten(users)}"
    return line, (space.size, kind, space.stack, frozenset(map(_pattern, users)))


def _describe_site(structure: GradientStructure, index: int, site: Site) -> tuple[str, Hashable]:
    has = {"input": "activation", "output": "tangent", "inner": "activation and tangent"}[site.kind]
    spaces = " x ".join(map(str, site.spaces)) or "(one neuron)"
    copies = "".join(f", copies along space {site.spaces[d]}" for d in site.copies)
    line = f"{index}: {site.size} neurons of space {spaces}, set of {site.set_size}, {has}{copies}"
    kinds = tuple((structure.spaces[s].size, structure.spaces[s].permutable) for s in site.spaces)
    return line, (kinds, site.set_size, site.set_axes, has, copies)


def _collapse(lines: Sequence[tuple[str, Hashable]], most: int = 3) -> list[str]:
    """Of lines that are alike, if they are many, the first with their number."""
    count = Counter(key for _, key in lines)
    seen: set[Hashable] = set()
    shown = []
    for line, key in lines:
        if count[key] <= most:
            shown.append(f"  {line}")
        elif key not in seen:
            shown.append(f"  {line}; and {count[key] - 1} like it")
            seen.add(key)
    return shown


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _shorten(names: Sequence[str], most: int = 2) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
