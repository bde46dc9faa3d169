"""What a result was computed on, in words."""

import os
import platform
from collections import Counter
from pathlib import Path

import jax


def describe_hardware() -> str:
    """The processor, the number of cores that this process may use, and the accelerators; no names of hosts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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
