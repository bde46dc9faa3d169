"""How the unrolls of an estimator are spread over devices."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def usable_devices(parallel: int, devices: int) -> int:
    """How many of so many devices can share ``parallel`` unrolls evenly."""
    return max(n for n in range(1, devices + 1) if parallel % n == 0)


def unroll_shardings(parallel: int, devices: Sequence[jax.Device] | None = None) -> tuple[NamedSharding, NamedSharding]:
    """Shardings for an estimator's state and for everything else.

    Give the first to :func:`jax.jit` for an estimator's state (every leaf of which has the unrolls as its first axis)
    and the second for meta-parameters, data and keys; the compiler then runs each device's unrolls on that device and
    averages their contributions. One device is no special case.

    Args:
        parallel: size of the leading axis of the state, ``estimator.parallel``.
        devices: devices to use; those of all processes by default. As many of them are used as divide ``parallel``.

    Returns:
        ``(split, replicated)``.

    Raises:
        ValueError: there are more processes than can share the unrolls evenly.
    """
    processes, table = jax.process_count(), np.asarray(jax.devices() if devices is None else devices)
    if parallel % processes:
        raise ValueError(
            f"{parallel} pairs or unrolls cannot be shared evenly by {processes} processes; choose a multiple of "
            f"{processes} (pairs of a stage), or another number of processes"
        )
    # JAX lists the devices by process, equally many of each.
    table = table.reshape(processes, -1)
    each = usable_devices(parallel // processes, table.shape[1])
    mesh = Mesh(table[:, :each].ravel(), ("unrolls",))
    return NamedSharding(mesh, PartitionSpec("unrolls")), NamedSharding(mesh, PartitionSpec())


def replicate(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Copy arrays to all devices of a sharding, also to those of other processes, which must hold the same arrays."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    # device_put cannot send typed keys to other processes' devices, and would compare the arrays of all processes.
    return jax.jit(lambda x: x, out_shardings=sharding)(tree)
