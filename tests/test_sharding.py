import os
import subprocess
import sys
from pathlib import Path

import pytest

from gmn_lopt.meta.sharding import usable_devices

# The device count is fixed when JAX starts, so eight devices need a process of their own.
PROGRAM = """
import jax, numpy as np
from inner_problems import Smooth
from gmn_lopt.meta import PES, Truncated
from gmn_lopt.meta.sharding import unroll_shardings

assert len(jax.local_devices()) == 8
problem = Smooth(horizon=8, noise=0.2)
phi, data = problem.phi(), problem.data()
for estimator in (PES(problem, 16, 4), Truncated(problem, 16, 4)):
    results, flops = [], []
    for devices in (jax.local_devices()[:1], jax.local_devices()):
        split, replicated = unroll_shardings(estimator.parallel, devices)
        state = jax.jit(estimator.init, out_shardings=split)(phi, data, jax.random.key(0))
        shardings = dict(in_shardings=(replicated, split, replicated, replicated), out_shardings=(split, replicated))
        step = jax.jit(estimator.estimate, **shardings)
        flops.append(step.lower(phi, state, data, jax.random.key(0)).compile().cost_analysis()["flops"])
        for i in range(4):
            state, estimate = step(phi, state, data, jax.random.key(i))
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {len(devices)}
        results.append(jax.device_get(estimate))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)
    assert flops[1] < flops[0] / 4, flops
"""


def test_eight_devices_give_the_estimate_of_one():
    here = Path(__file__).parent
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("parallel", "devices", "used"), [(16, 8, 8), (6, 8, 6), (15, 8, 5), (7, 4, 1), (2, 8, 2)])
def test_as_many_devices_as_divide_the_unrolls(parallel, devices, used):
    assert usable_devices(parallel, devices) == used
