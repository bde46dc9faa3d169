"""Settings of all tests, made before JAX is imported."""

import os

# Tests compile a lot and compute little.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
