"""What the benchmark measures with: tasks on random data, the work in a program, a machine's rate."""

import importlib
import math
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from gmn_lopt.meta.task import Task
from gmn_lopt.tasks import lm1b_transformer
from gmn_lopt.tasks.data import Dataset
from gmn_lopt.tasks.mlp import make_mlp

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
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(shapes[0][d] for d in contracted)
            total += 2.0 * depth * math.prod(getattr(equation.outvars[0].aval, "shape", ()))
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


def matrix_product_rate(repeats: int) -> float:
    """FLOP/s of a large float32 matrix product, on all devices at once, at JAX's default precision."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    product = jax.jit(jnp.matmul)
    operands = [jax.device_put(jnp.ones((size, size)), device) for device in jax.local_devices()]
    run = lambda: jax.block_until_ready([product(x, x) for x in operands])  # noqa: E731
    run()  # compiles
    return 2.0 * size**3 * len(operands) / statistics.median(seconds(run) for _ in range(repeats))


def seconds(run: Callable[[], Any]) -> float:
    """The time that a call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
