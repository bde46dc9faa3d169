"""The gradient structure of a model: what GradMetaNet has to know about it, static and hashable.

A structure is found by :func:`gmn_lopt.analyze`; this file only says what it consists of and how it prints.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
from jaxtyping import Array, PyTree


class StructureError(ValueError):
    """The model, its parameters or its factors do not fit what an operation needs."""


@dataclass(frozen=True)
class Space:
    """A set of neurons that may only be permuted together.

    Attributes:
        size: number of neurons.
        permutable: whether the loss is unchanged when the space's neurons are permuted in every parameter at once. A
            space that is not permutable is *fixed*: something in the model uses its neurons by their position.
        stack: indices of the spaces at each of whose positions the neurons may be permuted by themselves: the scanned
            axis, for the hidden neurons of layers that are stacked and scanned over. Empty for most spaces.
    """

    size: int
    permutable: bool
    stack: tuple[int, ...] = ()


@dataclass(frozen=True)
class Site:
    """A place in the model where neurons have factors: an activation, a tangent, or one of each.

    Attributes:
        spaces: indices into ``GradientStructure.spaces``; the site's neurons are their product, row-major (one space
            for most sites; heads and the dimensions of a head for attention).
        size: number of neurons, the product of the sizes of the spaces.
        set_size: number of elements ``S`` of the set that the factors at this site run over.
        set_axes: names the axes that the set consists of; sites with equal ``set_axes`` share their set, element by
            element.
        activation: index into ``Factors.activations``, or None at a site that is only written.
        tangent: index into ``Factors.tangents``, or None at a site that is only read.
        copies: positions in ``spaces`` of axes along which the same neurons are repeated: the scanned axis, at sites in
            the residual stream of layers that are stacked and scanned over. Empty for most sites.
    """

    spaces: tuple[int, ...]
    size: int
    set_size: int
    set_axes: tuple[int, ...]
    activation: int | None
    tangent: int | None
    copies: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """``"input"`` (only read), ``"output"`` (only written) or ``"inner"``."""
        if self.tangent is None:
            return "input"
        return "output" if self.activation is None else "inner"


@dataclass(frozen=True)
class SiteRef:
    """Where the neurons of a site lie in a parameter.

    Attributes:
        site: index into ``GradientStructure.sites``.
        dims: for each space of the site, the dimension of the parameter *in its cut shape* that runs over it.
    """

    site: int
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One leaf of the parameters.

    Attributes:
        name: its path in the tree, as :func:`jax.tree_util.keystr` writes it.
        shape: its shape.
        dtype: name of its dtype.
        cut_shape: its shape with each axis cut into the spaces it is a product of; ``leaf.reshape(cut_shape)`` is
            always valid. Equal to ``shape`` unless an axis is a product.
        spaces: for each dimension of ``cut_shape`` an index into ``GradientStructure.spaces``.
        sites: the sites whose neurons describe it: ``()``, one (a bias, a scale), or two (a kernel: the site it reads
            from, then the site it writes to).
        status: ``"factored"``: its factors give its whole gradient. ``"partial"``: it has factors, which give only a
            part of its gradient. ``"unfactored"``: it has none. ``"unused"``: the loss does not depend on it.
        reason: why the status is not ``"factored"``; empty otherwise.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    cut_shape: tuple[int, ...]
    spaces: tuple[int, ...]
    sites: tuple[SiteRef, ...]
    status: str
    reason: str = ""

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layer:
    """One linear map ``u = a W + b`` of the model; of layers that are stacked and scanned over, the whole stack.

    Attributes:
        kernel: index into ``GradientStructure.parameters``.
        bias: index into ``GradientStructure.parameters``, or None.
        activation: index into ``Factors.activations``.
        tangent: index into ``Factors.tangents``.
        kernel_gradient: ``(activation, tangent, kernel) -> dense gradient``; not part of the comparison of structures.
        bias_gradient: ``(tangent, bias) -> dense gradient``, or None; likewise.
        embedding: whether it looks up rows of its kernel; the activations are then indices (token ids) ``[S, 1]``, at
            no site, in place of one-hot rows, which are never built.
    """

    kernel: int
    bias: int | None
    activation: int
    tangent: int
    kernel_gradient: Callable[..., Array] | None = field(default=None, compare=False, repr=False)
    bias_gradient: Callable[..., Array] | None = field(default=None, compare=False, repr=False)
    embedding: bool = False


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
    """

    activations: tuple[jax.Array, ...]
    tangents: tuple[jax.Array, ...]


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
        """Indices of the activations that are token ids, integers ``[S, 1]`` read by embeddings."""
        return frozenset(layer.activation for layer in self.layers if layer.embedding)

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
        """
        self.check_factors(factors)
        gradients: list[Array | None] = [None] * len(self.parameters)

        def add(leaf: int, gradient: Array) -> None:
            previous = gradients[leaf]
            gradients[leaf] = gradient if previous is None else previous + gradient

        def wanted(leaf: int) -> jax.ShapeDtypeStruct | None:
            parameter = self.parameters[leaf]
            return jax.ShapeDtypeStruct(parameter.shape, parameter.dtype) if parameter.status == "factored" else None

        for layer in self.layers:
            activation, tangent = factors.activations[layer.activation], factors.tangents[layer.tangent]
            if (kernel := wanted(layer.kernel)) is not None and layer.kernel_gradient is not None:
                add(layer.kernel, layer.kernel_gradient(activation, tangent, kernel))
            if layer.bias is not None and layer.bias_gradient is not None and (bias := wanted(layer.bias)) is not None:
                add(layer.bias, layer.bias_gradient(tangent, bias))
        return jax.tree.unflatten(self.treedef, gradients)

    def check_factors(self, factors: Factors, any_set_size: bool = False) -> None:
        """Raise a StructureError unless the factors have the shapes of this structure.

        Args:
            factors: the factors.
            any_set_size: whether their sets may have other sizes, such as those of a batch of another size; sets that
                were of one size must still be.
        """
        sizes: dict[int, int] = {}
        for kind, shapes in (("activations", self.activation_shapes), ("tangents", self.tangent_shapes)):
            arrays = getattr(factors, kind)
            if len(arrays) != len(shapes):
                raise StructureError(
                    f"factors.{kind} holds {len(arrays)} arrays, but {len(shapes)} in the analysed model; "
                    "take factors from value_grad_and_factors of the loss that was analysed"
                )
            for i, (array, shape) in enumerate(zip(arrays, shapes)):
                if len(array.shape) == 2 and array.shape[1] == shape[1]:
                    if array.shape[0] == (sizes.setdefault(shape[0], array.shape[0]) if any_set_size else shape[0]):
                        continue
                    raise StructureError(
                        f"factors.{kind}[{i}] has a set of {array.shape[0]} elements, but {shape[0]} when the model "
                        "was analysed; analyse the loss with a batch of this size"
                    )
                raise StructureError(
                    f"factors.{kind}[{i}] has shape {array.shape}, but {shape} in the analysed model; "
                    "take factors from value_grad_and_factors of the loss that was analysed"
                )

    def __str__(self) -> str:
        from gmn_lopt.factors.table import table

        return table(self)
