"""Factors on several devices: of which device they are, and those of the whole batch from those of its shards.

Under ``jit`` with shardings arrays are global, and so are factors. Inside ``shard_map`` and ``pmap`` each device has
its own, of its shard of the batch. ``shard_map`` then knows (unless ``check_vma=False``) over which axes of the mesh an
array *varies*, and sums cotangents of those that do not: a perturbation has to vary as what it is added to.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from gmn_lopt.factors.structure import Factors

AxisName = Hashable | tuple[Hashable, ...]


def gather_factors(factors: Factors, axis_name: AxisName) -> Factors:
    """The factors of the mean over devices, from those of each: for factors what ``jax.lax.pmean`` is for gradients.

    The sets are joined, and tangents divided by the number of devices; of sets that do not come from the batch, which
    all devices have alike, the tangents are averaged. Call it inside ``shard_map`` or ``pmap``, where each device has
    computed the factors of its shard of the batch, with a loss that is the mean over that shard or, by ``pmean`` or
    ``psum``, over the batch. Every device gets the same, bit for bit; ``shard_map`` knows that (``out_specs=P()``).
    Axes over which no factor varies are passed over, where ``shard_map`` says so.

    Args:
        factors: of the shard, activations ``[S, d_in]`` and tangents ``[S, d_out]``.
        axis_name: the axis, or axes, over which the batch is split into shards of equal size.

    Returns:
        Activations ``[N S, d_in]`` and tangents ``[N S, d_out]``, for ``N`` devices, in their order; within each part
        (:attr:`Factors.parts`), where sets consist of several.

    Raises:
        NameError: there is no such axis here.

    Example:
        >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
        >>> def gradient(w, x):
        ...     _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(w, x)
        ...     return jax.lax.pmean(grads, "data"), gmn_lopt.gather_factors(factors, "data")
        >>> w, x = jnp.ones((2, 1)), jnp.array([[[1.0, 0.0]], [[1.0, 2.0]]])  # two shards of one example
        >>> grads, factors = jax.vmap(gradient, (None, 0), None, axis_name="data")(w, x)
        >>> factors.tangents[0]
        Array([[1.],
               [3.]], dtype=float32)
        >>> bool((factors.activations[0].T @ factors.tangents[0] == grads).all())
        True
    """
    # The last axis first, so that the devices are in the order of the axes.
    for axis in reversed(axis_name if isinstance(axis_name, tuple) else (axis_name,)):
        known = varying(jax.lax.axis_index(axis))
        if known <= varying(*jax.tree.leaves(factors)):
            factors = _gather(factors, axis, "invarying" if known else "varying")
    return factors


def _gather(factors: Factors, axis: Hashable, to: str) -> Factors:
    leaves, first, size = jax.tree.leaves(factors), len(factors.activations), jax.lax.axis_size(axis)
    parts = [list(of) for of in factors.parts]
    for i, x in enumerate(leaves):
        if i not in factors.without_batch:
            pieces = jnp.split(x, parts[i][1:-1]) if parts else [x]
            pieces = [jax.lax.all_gather(piece, axis, tiled=True, to=to) for piece in pieces]
            gathered = jnp.concatenate(pieces) if len(pieces) > 1 else pieces[0]
            leaves[i] = gathered if i < first else gathered / size
            if parts:
                parts[i] = [size * start for start in parts[i]]
        elif i >= first:
            leaves[i] = jax.lax.pmean(x, axis)
        elif axis in varying(x):
            leaves[i] = jax.lax.pmax(x, axis)  # all devices have the same, which shard_map does not know
    return replace(
        factors,
        activations=tuple(leaves[:first]),
        tangents=tuple(leaves[first:]),
        parts=tuple(tuple(of) for of in parts),
    )


def varying(*arrays: Any) -> frozenset[Hashable]:
    """The axes of the mesh over which any of the arrays varies, as far as ``shard_map`` knows."""
    return frozenset().union(*(jax.typeof(x).mat.varying for x in arrays))


def make_varying(array: Array, axes: frozenset[Hashable]) -> Array:
    """The array, varying over these axes as well."""
    missing = tuple(axes - varying(array))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def zeros_like(aval: Any, shape: Sequence[int]) -> Array:
    """Zeros of an array's dtype, spread over devices like it; axes in front of its own are whole on each."""
    mesh, front = aval.sharding.mesh, [None] * (len(shape) - len(aval.shape))
    sharding = NamedSharding(mesh, PartitionSpec(*front, *aval.sharding.spec)) if mesh.explicit_axes else None
    return make_varying(jnp.zeros(shape, aval.dtype, out_sharding=sharding), aval.mat.varying)


def at_scale_of_shard(tangent: Array, loss: Array, params: Sequence[Array]) -> Array:
    """A tangent such that the mean over devices is that of the mean loss, where ``shard_map`` sums by itself.

    Over axes over which neither parameters nor loss vary, a device contributes to the gradient of the whole batch's
    loss, as their sum; and over those over which the loss does but the tangent does not, they have been summed.
    """
    contributes = tuple(varying(tangent) - varying(loss, *params))
    summed = tuple(varying(loss) - varying(tangent))
    if not contributes and not summed:
        return tangent
    return tangent * (jax.lax.axis_size(contributes) / jax.lax.axis_size(summed))


def as_in_context(x: Array) -> Array:
    """An array from where axes of the mesh are explicit to where they are the compiler's, or back."""
    mesh, context = jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh()
    if mesh.empty or context.empty or mesh.explicit_axes == context.explicit_axes:
        return x
    return jax.sharding.reshard(x, PartitionSpec(*[None] * x.ndim))


def leave_to_compiler(function: Callable[..., PyTree], like: PyTree, *args: PyTree) -> PyTree:
    """Apply a function that says nothing of devices, also to arrays whose mesh has explicit axes.

    Args:
        function: the function, of arrays.
        like: how its results are spread over devices, a tree of :class:`jax.sharding.PartitionSpec` like them, or of
            arrays that they are spread like.
        *args: its arguments.
    """
    meshes = [mesh for x in jax.tree.leaves(args) if (mesh := jax.typeof(x).sharding.mesh).explicit_axes]
    if not meshes:
        return function(*args)

    def sharding(x: Any) -> NamedSharding:
        return NamedSharding(meshes[0], x if isinstance(x, PartitionSpec) else jax.typeof(x).sharding.spec)

    shardings = jax.tree.map(sharding, like, is_leaf=lambda x: isinstance(x, PartitionSpec))
    return jax.sharding.auto_axes(function, axes=meshes[0].explicit_axes, out_sharding=shardings)(*args)
