"""Neuron spaces, sites, and how a parameter lies in them (arXiv:2507.01649, section 3)."""

import math
from dataclasses import dataclass


class StructureError(ValueError):
    """The model, its parameters or its factors do not fit what an operation needs.

    Example:
        >>> import gmn_lopt, jax.numpy as jnp
        >>> try:
        ...     gmn_lopt.analyze(lambda w: w, jnp.ones(3))  # no scalar
        ... except gmn_lopt.StructureError:
        ...     print("refused")
        refused
    """


@dataclass(frozen=True)
class Space:
    """A set of neurons that may only be permuted together.

    Attributes:
        size: number of neurons.
        permutable: whether the loss is unchanged when the space's neurons are permuted in every parameter at once. A
            space that is not permutable is *fixed*: something in the model uses its neurons by their position.
        stack: indices of the spaces at each of whose positions the neurons may be permuted by themselves: the scanned
            axis, for the hidden neurons of layers that are stacked and scanned over. Empty for most spaces.

    Example:
        >>> import gmn_lopt, jax.numpy as jnp
        >>> model = lambda w, x: jnp.sum(jnp.tanh(x @ w))
        >>> structure = gmn_lopt.analyze(model, jnp.ones((2, 3)), jnp.ones((4, 2)))
        >>> structure.spaces[0]  # the inputs
        Space(size=2, permutable=False, stack=())
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

    Example:
        >>> import gmn_lopt, jax.numpy as jnp
        >>> model = lambda w, x: jnp.sum(jnp.tanh(x @ w))
        >>> structure = gmn_lopt.analyze(model, jnp.ones((2, 3)), jnp.ones((4, 2)))
        >>> site = structure.sites[0]
        >>> site.kind, site.size, site.set_size
        ('input', 2, 4)
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

    Example:
        >>> import gmn_lopt, jax.numpy as jnp
        >>> model = lambda w, x: jnp.sum(jnp.tanh(x @ w))
        >>> structure = gmn_lopt.analyze(model, jnp.ones((2, 3)), jnp.ones((4, 2)))
        >>> structure.parameters[0].sites  # rows are the neurons of site 0, columns those of site 1
        (SiteRef(site=0, dims=(0,)), SiteRef(site=1, dims=(1,)))
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
        positions: the dimensions of ``cut_shape`` that run over the positions of a window, in the order in which a
            convolution does; at no site.

    Example:
        >>> import gmn_lopt, jax.numpy as jnp
        >>> model = lambda w, x: jnp.sum(jnp.tanh(x @ w))
        >>> structure = gmn_lopt.analyze(model, jnp.ones((2, 3)), jnp.ones((4, 2)))
        >>> kernel = structure.parameters[0]
        >>> kernel.shape, kernel.spaces, kernel.status
        ((2, 3), (0, 1), 'factored')
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    cut_shape: tuple[int, ...]
    spaces: tuple[int, ...]
    sites: tuple[SiteRef, ...]
    status: str
    reason: str = ""
    positions: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)
