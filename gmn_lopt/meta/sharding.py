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

    Give the first to :func:`jax.jit` for an estimator's state (every leaf of which has the unrolls as its first axis)
    and the second for meta-parameters, data and keys; the compiler then runs each device's unrolls on that device and
    averages their contributions. One device is no special case.

    Args:
        parallel: size of the leading axis of the state, ``estimator.parallel``.
        devices: devices to use; all local devices by default. As many of them are used as divide ``parallel``.

    Returns:
        ``(split, replicated)``.
    """
    devices = jax.local_devices() if devices is None else devices
    mesh = Mesh(np.asarray(devices[: usable_devices(parallel, len(devices))]), ("unrolls",))
    return NamedSharding(mesh, PartitionSpec("unrolls")), NamedSharding(mesh, PartitionSpec())
