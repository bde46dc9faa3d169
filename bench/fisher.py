"""Time and memory of the Fisher estimators beside ``vmap(grad)``: ``python -m bench.fisher [--out DIR]``.

The model is a multi-layer perceptron on random data. Naive forms build the gradient of every example under ``vmap`` and
go on from there, compiled as one program like the library's. Memory is what the compiled program needs beside its
arguments: results and temporaries, by XLA's own account. Forms are timed in turn, so that a busy machine slows them
alike; medians count.
"""

import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

import gmn_lopt
from bench.measure import seconds
from gmn_lopt.cli.command_line import parse
from gmn_lopt.util.errors import UsageError
from gmn_lopt.util.hardware import describe_hardware


@dataclass(frozen=True)
class Config:
    """What to measure. Defaults are a perceptron of about a million weights."""

    examples: int = 128
    """Examples in the batch."""
    widths: tuple[int, ...] = (784, 768, 512, 10)
    """Neurons of each layer, inputs first."""
    repeats: int = 9
    """Calls timed; the median counts."""
    out: Path | None = None
    """Directory for fisher.json, all figures."""


def loss_fn(params: PyTree, x: Array, labels: Array) -> Array:
    """The cross-entropy of a perceptron."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    logits = x @ params[-1]["w"] + params[-1]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def gradients(params: PyTree, *batch: Array) -> PyTree:
    """The gradient of every example."""
    return jax.vmap(jax.grad(loss_fn), (None, 0, 0))(params, *(x[:, None] for x in batch))


def along(each: PyTree, vector: PyTree) -> Array:
    """Inner products of all examples' gradients with a vector."""
    products = jax.tree.map(lambda g, v: g.reshape(len(g), -1) @ v.ravel(), each, vector)
    return jnp.asarray(sum(jax.tree.leaves(products)))


def naive_product(params: PyTree, *batch: Array) -> PyTree:
    """``F v`` from the gradients of all examples, with the parameters as the vector."""
    each = gradients(params, *batch)
    weights = along(each, params) / len(batch[0])
    return jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), each)


FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "diagonal": (
        lambda p, *batch: jax.tree.map(lambda g: (g**2).mean(0), gradients(p, *batch)),
        lambda p, *batch: gmn_lopt.fisher_diagonal(loss_fn, p, *batch),
    ),
    "trace": (
        lambda p, *batch: sum((g**2).sum() for g in jax.tree.leaves(gradients(p, *batch))) / len(batch[0]),
        lambda p, *batch: gmn_lopt.fisher_trace(loss_fn, p, *batch),
    ),
    "vector product": (
        naive_product,
        lambda p, *batch: gmn_lopt.empirical_fisher_vector_product(loss_fn, p, *batch)(p),
    ),
}


def main(config: Config) -> list[dict[str, Any]]:
    """Measure, print the table, and return the figures.

    Raises:
        UsageError: in one line, what cannot be measured.
    """
    if config.examples < 1 or config.repeats < 1 or len(config.widths) < 2 or min(config.widths) < 1:
        raise UsageError("--examples, --repeats and --widths must be at least 1, of two widths or more")
    keys = jax.random.split(jax.random.key(0), len(config.widths) + 1)
    params = [
        {"w": jax.random.normal(key, (m, n)) / m**0.5, "b": jnp.zeros(n)}
        for key, (m, n) in zip(keys, itertools.pairwise(config.widths))
    ]
    x = jax.random.normal(keys[-1], (config.examples, config.widths[0]))
    batch = x, jax.random.randint(keys[-2], (config.examples,), 0, config.widths[-1])
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"JAX {jax.__version__}, {describe_hardware()}; {weights:,} weights, {config.examples} examples\n")
    print("| | time (ms) | vmap(grad) | ratio | memory (MB) | vmap(grad) | ratio |\n|---|---|---|---|---|---|---|")
    figures = []
    for name, functions in FORMS.items():
        compiled = [jax.jit(function).lower(params, *batch).compile() for function in functions]
        sizes: list[Any] = [c.memory_analysis() for c in compiled]
        memory = [size.temp_size_in_bytes + size.output_size_in_bytes for size in sizes]
        runs = [lambda c=c: jax.block_until_ready(c(params, *batch)) for c in compiled]
        for run in runs:
            run()
        times = zip(*([seconds(run) for run in runs] for _ in range(config.repeats)))
        naive, own = map(statistics.median, times)
        print(
            f"| {name} | {own * 1e3:,.1f} | {naive * 1e3:,.1f} | {naive / own:.1f} | {memory[1] / 1e6:,.1f} | "
            f"{memory[0] / 1e6:,.1f} | {memory[0] / memory[1]:.1f} |",
            flush=True,
        )
        figures.append({"name": name, "seconds": own, "naive_seconds": naive, "bytes": memory[1]})
        figures[-1]["naive_bytes"] = memory[0]
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "fisher.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


if __name__ == "__main__":
    try:
        main(parse(Config, __doc__))
    except UsageError as error:
        sys.exit(f"bench.fisher: {error}")
