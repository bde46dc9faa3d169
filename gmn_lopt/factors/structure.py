"""The gradient structure of a model: what GradMetaNet has to know about it, static and hashable.

A structure is found by :func:`gmn_lopt.analyze`; this file only says what it consists of and how it prints.
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
from jaxtyping import Array, PyTree

from gmn_lopt.factors.kinds import LayerKind
from gmn_lopt.factors.spaces import Parameter, Site, Space, StructureError

WIDTH = 120  # of the printed structure


@dataclass(frozen=True)
class Layer:
    """One linear map ``u = a W + b`` of the model; of layers that are stacked and scanned over, the whole stack.

    Attributes:
        kind: what kind of layer it is (:mod:`gmn_lopt.factors.kinds`).
        kernel: index into ``GradientStructure.parameters``.
        bias: index into ``GradientStructure.parameters``, or None.
        activation: index into ``Factors.activations``.
        tangent: index into ``Factors.tangents``.
        gradients: ``(activation, tangent) -> (the kernel's dense gradient, the bias's or None)``; not part of the
            comparison of structures.

    Example:
        >>> import gmn_lopt, jax.numpy as jnp
        >>> model = lambda w, x: jnp.sum(jnp.tanh(x @ w))
        >>> structure = gmn_lopt.analyze(model, jnp.ones((2, 3)), jnp.ones((4, 2)))
        >>> [(layer.kernel, layer.bias, layer.activation, layer.tangent) for layer in structure.layers]
        [(0, None, 0, 0)]
    """

    kind: LayerKind
    kernel: int
    bias: int | None
    activation: int
    tangent: int
    gradients: Callable[[Array, Array], tuple[Array, Array | None]] | None = field(
        default=None, compare=False, repr=False
    )


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

    Example:
        >>> import gmn_lopt, jax.numpy as jnp
        >>> model = lambda w, x: jnp.sum(jnp.tanh(x @ w))
        >>> structure = gmn_lopt.analyze(model, jnp.ones((2, 3)), jnp.ones((4, 2)))
        >>> len(structure.layers), len(structure.spaces), len(structure.sites)
        (1, 2, 2)
        >>> print(structure)  # doctest: +ELLIPSIS
        1 layers
           [2x3]: site 0 -> site 1
        ...
    """

    spaces: tuple[Space, ...]
    sites: tuple[Site, ...]
    parameters: tuple[Parameter, ...]
    layers: tuple[Layer, ...]
    treedef: jax.tree_util.PyTreeDef
    activation_shapes: tuple[tuple[int, int], ...]
    tangent_shapes: tuple[tuple[int, int], ...]

    @property
    def token_ids(self) -> frozenset[int]:
        """Indices of the activations that are at no site: token ids, integers ``[S, 1]`` read by embeddings."""
        return frozenset(layer.activation for layer in self.layers if not layer.kind.reads_neurons)

    def is_permutable(self, site: Site) -> bool:
        """Whether any neurons of a site may be permuted; otherwise it is fixed throughout, like the logits."""
        return any(self.spaces[space].permutable for space in site.spaces)

    def reconstruct(self, factors: Factors) -> PyTree:
        """Dense gradients from factors: the sum of the outer products of each parameter's layers.

        Args:
            factors: what :func:`gmn_lopt.value_grad_and_factors` returned for this structure.

        Returns:
            A tree like the parameters: the gradient of each factored parameter, None for all others.

        Raises:
            StructureError: the factors have other shapes than the structure.

        Example:
            >>> import gmn_lopt, jax.numpy as jnp
            >>> def loss(params, x):
            ...     return jnp.mean((x @ params["w"] * params["scale"]) ** 2)
            >>> params, x = {"scale": jnp.ones(3), "w": jnp.ones((2, 3))}, jnp.ones((5, 2))
            >>> _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, x)
            >>> rebuilt = gmn_lopt.analyze(loss, params, x).reconstruct(factors)
            >>> rebuilt["scale"] is None, bool(jnp.allclose(rebuilt["w"], grads["w"]))
            (True, True)
        """
        self.check_factors(factors)
        parts: dict[int, list[Array]] = {}
        for layer in self.layers:
            assert layer.gradients is not None
            found = layer.gradients(factors.activations[layer.activation], factors.tangents[layer.tangent])
            for leaf, gradient in zip((layer.kernel, layer.bias), found):
                if leaf is not None and gradient is not None and self.parameters[leaf].status == "factored":
                    parts.setdefault(leaf, []).append(gradient)
        gradients = [sum(parts[i][1:], parts[i][0]) if i in parts else None for i in range(len(self.parameters))]
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
        """Layers, spaces, sites, and every parameter whose factors do not give its whole gradient, with the reason."""
        lines = [f"{len(self.layers)} layers"]
        lines += [f"  {_describe_layer(self, layer)}" for layer in self.layers]

        lines.append(f"{len(self.spaces)} neuron spaces")
        for i, space in enumerate(self.spaces):
            users = [parameter.name for parameter in self.parameters if i in parameter.spaces]
            kind = "permutable" if space.permutable else "fixed"
            each = f" in each of space {' x '.join(map(str, space.stack))} by itself" if space.stack else ""
            lines.append(f"  {i}: {space.size} neurons, {kind}{each}, in {_shorten(users)}")

        lines.append(f"{len(self.sites)} sites")
        for i, site in enumerate(self.sites):
            has = {"input": "activation", "output": "tangent", "inner": "activation and tangent"}[site.kind]
            spaces = " x ".join(map(str, site.spaces)) or "(one neuron)"
            copies = "".join(f", copies along space {site.spaces[d]}" for d in site.copies)
            lines.append(f"  {i}: {site.size} neurons of space {spaces}, set of {site.set_size}, {has}{copies}")

        odd: dict[tuple[str, str], list[str]] = {}
        for parameter in self.parameters:
            if parameter.status != "factored":
                odd.setdefault((parameter.status, parameter.reason), []).append(parameter.name)
        count = len(self.parameters)
        lines.append(f"{count - sum(map(len, odd.values()))} of {count} parameters factored")
        for (status, reason), names in odd.items():
            text = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {status}: {reason}"
            lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
        return "\n".join(lines)


def _describe_layer(structure: GradientStructure, layer: Layer) -> str:
    kernel = structure.parameters[layer.kernel]
    bias = "" if layer.bias is None else f" + {structure.parameters[layer.bias].name}"
    sites = (f"site {i}" for i, site in enumerate(structure.sites) if site.activation == layer.activation)
    reads = next(sites, "token ids")
    writes = next(i for i, site in enumerate(structure.sites) if site.tangent == layer.tangent)
    return f"{kernel.name} [{'x'.join(map(str, kernel.shape))}]{bias}: {reads} -> site {writes}"


def _shorten(names: list[str], most: int = 2) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
