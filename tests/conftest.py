"""Settings of all tests, made before JAX is imported."""

import os

# Tests compile a lot and compute little.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# The same number of devices in the processes that tests start, so that their results are the same bit for bit.
ONE_DEVICE = "--xla_force_host_platform_device_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION} {ONE_DEVICE}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
