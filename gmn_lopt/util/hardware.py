"""What a result was computed on, in words."""

import os
import platform
from collections import Counter
from pathlib import Path

import jax


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores() -> None:
    """Make every core of the processor a device of its own, before JAX is used, so that unrolls can be spread over it.

    The operations of small inner problems are too small to be split over threads, so one device keeps one core busy.
    A count given in XLA_FLAGS is respected, and accelerators are not affected.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", usable_cores())


def describe_hardware() -> str:
    """The processor, the number of cores that this process may use, and the accelerators; no names of hosts."""
    cores = usable_cores()
    parts = [f"{_processor()} ({platform.machine()}), {cores} core{'s' * (cores != 1)}"]
    kinds = Counter(device.device_kind for device in jax.devices() if device.platform != "cpu")
    return ", ".join([*parts, *(f"{count} x {kind}" for kind, count in kinds.items())])


def _processor() -> str:
    """The processor's model; where Linux does not tell, what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or "processor"
