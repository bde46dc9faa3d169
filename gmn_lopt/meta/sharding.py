"""How the unrolls of an estimator are spread over devices."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def usable_devices(parallel: int, devices: int) -> int:
    """How many of so many devices can share ``parallel`` unrolls evenly."""
    return max(n for n in range(1, devices + 1) if parallel % n == 0)


def unroll_shardings(parallel: int, devices: Sequence[jax.Device] | None = None) -> tuple[NamedSharding, NamedSharding]:
    """Shardings for an estimator's state and for everything else.

    Every leaf of the state has the unrolls as its first axis. Given to :func:`jax.jit`, the first for the state and the
    second for meta-parameters, data and keys, each device runs its own unrolls. One device is no special case.

    Args:
        parallel: size of the leading axis of the state, ``estimator.parallel``.
        devices: devices to use, of which as many are that divide ``parallel``; default: those of all processes.

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
