"""Settings of all tests, made before JAX is imported."""

import gc
import os

import pytest

# Tests compile a lot and compute little.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# The same number of devices in the processes that tests start, so that their results are the same bit for bit.
ONE_DEVICE = "--xla_force_host_platform_device_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION} {ONE_DEVICE}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# What a test compiles is not found compiled by another.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"


@pytest.fixture(scope="module", autouse=True)
def _drop_compiled_programs():
    """Compiled programs hold memory maps. Linux gives a process 65,530; without more, XLA's compiler crashes."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
