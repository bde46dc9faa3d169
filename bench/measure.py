"""What benchmarks measure with: clocks, synthetic tasks, the work in a program, a machine's rate, times in turn."""

import importlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr

from gmn_lopt.meta.estimator import Estimator
from gmn_lopt.meta.meta_step import MetaStep
from gmn_lopt.meta.task import Task
from gmn_lopt.tasks import lm1b_transformer
from gmn_lopt.tasks.data import Dataset
from gmn_lopt.tasks.mlp import make_mlp

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.process_time}
"""Seconds of the wall clock; or of processor time, summed over cores, for a machine that other work runs on."""
FEATURES = {"fashion_mnist_mlp": 64, "cifar10_mlp": 192, "cifar100_mlp": 192}
IMAGES = 10_000


def synthetic_task(name: str) -> Task:
    """A task of tasks/ on random images, or random tokens, of its shapes, so that nothing is downloaded."""
    rng = np.random.default_rng(0)
    if name == "lm1b_transformer":
        tokens = rng.integers(0, 1000, 8 * IMAGES).astype(np.uint16)
        with mock.patch.object(lm1b_transformer, "load_tokens", lambda *_: {"train": tokens, "test": tokens}):
            return lm1b_transformer.make()
    make: Any = importlib.import_module(f"gmn_lopt.tasks.{name}").make  # make_mlp with a name and a data set
    classes = make.args[1].classes
    split = {
        "image": rng.uniform(size=(IMAGES, FEATURES[name])).astype(np.float32),
        "label": rng.integers(0, classes, IMAGES).astype(np.int32),
    }
    data = Dataset(lambda _: dict.fromkeys(("train", "valid", "test"), split), classes)
    return make_mlp(name, data, **make.keywords)


def matrix_flops(function: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of a function's matrix products, factorisations and triangular solves.

    Counted in its jaxpr, where the body of a loop counts as often as it is taken; XLA's own count takes it once.
    What is done entry by entry is left out: the rate that this is compared with is that of matrix products too.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        shapes: list[tuple[int, ...]] = [getattr(v.aval, "shape", ()) for v in equation.invars]
        results: list[tuple[int, ...]] = [getattr(v.aval, "shape", ()) for v in equation.outvars]
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(shapes[0][d] for d in contracted)
            total += 2.0 * depth * math.prod(results[0])
        elif name == "cholesky":
            total += math.prod(shapes[0]) * shapes[0][-1] / 3
        elif name == "triangular_solve":
            total += math.prod(shapes[1]) * shapes[0][-1]
        inner = [_count(sub) for value in params.values() for sub in _jaxprs(value)]
        total += params.get("length", 1) * sum(inner) if name != "cond" else max(inner, default=0.0)
    return total


def _jaxprs(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    return [sub for v in value for sub in _jaxprs(v)] if isinstance(value, tuple | list) else []


def matrix_product_rate(clock: Clock, repeats: int) -> float:
    """FLOP/s of a large float32 matrix product, on all devices at once, at JAX's default precision."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    product = jax.jit(jnp.matmul)
    operands = [jax.device_put(jnp.ones((size, size)), device) for device in jax.local_devices()]

    def run() -> float:
        begin = clock()
        jax.block_until_ready([product(x, x) for x in operands])
        return clock() - begin

    run()
    return 2.0 * size**3 * len(operands) / statistics.median(run() for _ in range(repeats))


@dataclass
class MetaStepRun:
    """A compiled meta-step of one estimator, ready to be timed.

    Attributes:
        inner_steps: of one meta-step.
        flops: of one meta-step, see :func:`matrix_flops`.
        compile_seconds: what compiling it took.
        memory: peak memory in bytes, of all devices of this process: what goes in, comes out and lies in between.
        seconds: of each timed meta-step.
    """

    inner_steps: int
    flops: float
    compile_seconds: float
    memory: float
    seconds: list[float]
    _take: Callable[[], None]

    def take(self, clock: Clock) -> None:
        """Take one meta-step and note its time."""
        begin = clock()
        self._take()
        self.seconds.append(clock() - begin)


def prepare(estimator: Estimator, phi: Any, splits: Any, clock: Clock) -> MetaStepRun:
    """Compile a meta-step and take the first."""
    step = MetaStep(estimator, optax.adam(1e-4))
    data, key = step.place((splits, jax.random.key(1)))
    state = step.init(phi, data, key)
    flops = matrix_flops(estimator.estimate, phi, state.estimator, data, key)
    begin = clock()
    compiled = step.compile(state, data, key)
    compile_seconds = clock() - begin
    sizes = compiled.memory_analysis()
    memory = math.nan
    if sizes is not None:
        kept = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        memory = float(kept + sizes.temp_size_in_bytes) * jax.local_device_count()
    number = 0

    def take() -> None:
        nonlocal state, number
        state, _ = jax.block_until_ready(compiled(state, data, key, np.uint32(number)))
        number += 1

    take()
    return MetaStepRun(estimator.inner_steps, flops, compile_seconds, memory, [], take)


def time_in_turn(runs: Sequence[MetaStepRun], repeats: int, clock: Clock) -> None:
    """Time all runs, one meta-step of each after the other, so that a busy machine slows them alike."""
    for _ in range(repeats):
        for run in runs:
            run.take(clock)
