"""What an update costs: time and memory of whole training steps, from small models to the shape of GPT-2 small.

python -m bench.update [--models mlp_1m transformer_4m] [--tokens 1024 2048] [--optimizers adamw default] [--out DIR]

A step is one call of one compiled function, its state donated: forward and backward pass, factors if the optimizer
needs them, update. Steps of all optimizers are taken in turn, so that a busy machine slows them alike. The first ten
are not counted: there the denoised direction is computed anew at each. Memory is what XLA says of each compiled
program: its temporaries, and the peak, with parameters, state and batch. Data are random.

On two cores a model of 10,000 parameters takes a minute and a half for all five optimizers, most of it to compile, and
one of a million three minutes at 2,048 tokens. `gpt2`, of 124 million, wants a larger machine: it was not run on two.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

import gmn_lopt
from bench.measure import seconds
from gmn_lopt.cli.command_line import parse
from gmn_lopt.evaluation.baselines import BASELINES
from gmn_lopt.evaluation.training import train_step
from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.optimizers.saved import load_learned
from gmn_lopt.tasks.transformer import Transformer
from gmn_lopt.util.errors import UsageError
from gmn_lopt.util.hardware import describe_hardware
from gmn_lopt.util.threads import one_blas_thread

FIRST = 10  # steps that are not counted
BATCHES = 4  # different ones, taken in turn


@dataclass(frozen=True)
class Perceptron:
    """A multi-layer perceptron that classifies: neurons of each layer, inputs first."""

    widths: tuple[int, ...]

    def init(self, key: jax.Array) -> PyTree:
        """Kernels of standard deviation ``1/sqrt(fan_in)``."""
        sizes = list(zip(jax.random.split(key, len(self.widths)), self.widths, self.widths[1:]))
        return [{"w": jax.random.normal(k, (m, n)) / m**0.5, "b": jnp.zeros(n)} for k, m, n in sizes]

    def loss(self, params: PyTree, batch: PyTree) -> Float[Array, ""]:
        """The cross-entropy."""
        x = batch["input"]
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        logits = x @ params[-1]["w"] + params[-1]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"]).mean()

    def batch(self, key: jax.Array, tokens: int) -> PyTree:
        """So many examples."""
        keys = jax.random.split(key)
        target = jax.random.randint(keys[1], (tokens,), 0, self.widths[-1])
        return {"input": jax.random.normal(keys[0], (tokens, self.widths[0])), "target": target}


class Language(Transformer):
    """A transformer, and what it reads."""

    def batch(self, key: jax.Array, tokens: int) -> PyTree:
        """So many tokens, as sequences."""
        drawn = jax.random.randint(key, (tokens // self.length, self.length + 1), 0, self.vocabulary)
        return {"input": drawn[:, :-1], "target": drawn[:, 1:]}


class Tied(Language):
    """A transformer whose table of tokens is the output layer, too."""

    def init(self, key: jax.Array) -> PyTree:
        """As :class:`Transformer`."""
        return {name: part for name, part in super().init(key).items() if name != "output"}

    def logits(
        self, params: PyTree, tokens: Int[Array | np.ndarray, "batch length"]
    ) -> Float[Array, "batch length vocabulary"]:
        """As :class:`Transformer`."""
        return super().logits(params | {"output": {"kernel": params["token"].T, "bias": jnp.zeros(())}}, tokens)


MODELS: dict[str, Perceptron | Language] = {
    "mlp_10k": Perceptron((64, 128, 10)),
    "mlp_100k": Perceptron((192, 256, 192, 10)),
    "mlp_1m": Perceptron((784, 768, 512, 10)),
    "mlp_10m": Perceptron((1024, 2048, 2048, 2048, 10)),
    "mlp_100m": Perceptron((*(4096,) * 7, 10)),
    "transformer_10k": Language(128, 8, 16, 2, 64, 2),
    "transformer_100k": Language(256, 64, 64, 4, 256, 2),
    "transformer_1m": Language(1000, 64, 128, 4, 512, 4),
    "transformer_4m": Language(1000, 128, 256, 8, 1024, 5),
    "transformer_30m": Language(8000, 256, 512, 8, 2048, 8),
    "gpt2": Tied(50257, 1024, 768, 12, 3072, 12),
}
Model = Literal[
    "mlp_10k",
    "mlp_100k",
    "mlp_1m",
    "mlp_10m",
    "mlp_100m",
    "transformer_10k",
    "transformer_100k",
    "transformer_1m",
    "transformer_4m",
    "transformer_30m",
    "gpt2",
]


@dataclass(frozen=True)
class Config:
    """What to measure. Defaults take a few minutes."""

    models: tuple[Model, ...] = ("mlp_10k", "mlp_100k", "transformer_10k", "transformer_100k")
    """Models, named by their numbers of parameters."""
    tokens: tuple[int, ...] = (256, 2048)
    """Tokens, or examples, in a step; whole sequences: 1,024 tokens of gpt2."""
    optimizers: tuple[str, ...] = ("adamw", "muon", "soap", "default", "default+gmn")
    """Baselines of gmn_lopt/evaluation/baselines, and saved optimizers; ratios are to the first."""
    steps: int = 20
    """Steps of each that are timed, after the first ten."""
    out: Path | None = None
    """Directory for update.json, all figures, with the time of each step."""


@dataclass
class Run:
    """A compiled training step, and where it has got to."""

    compiled: Any
    state: PyTree
    batches: Sequence[PyTree]
    taken: int = 0

    def step(self) -> None:
        """Take the next step, to its end."""
        self.state = jax.block_until_ready(self.compiled(*self.state, self.batches[self.taken % len(self.batches)]))
        self.taken += 1


def make(name: str, structure: GradientStructure) -> tuple[optax.GradientTransformation, bool]:
    """An optimizer with its starting settings, and whether it needs factors."""
    found = {baseline.name: baseline for baseline in BASELINES}.get(name)
    if found is None:
        lopt, phi = load_learned(name, structure)
        return lopt.optimizer(phi), lopt.needs_factors
    return found.construct(1000, **{axis.name: axis.start for axis in found.axes}), False


def prepare(name: str, model: Perceptron | Language, batches: Sequence[PyTree]) -> tuple[dict[str, Any], Run]:
    """Compile a training step, take the first ones, and say what they cost and what it needs."""
    params = jax.jit(model.init)(jax.random.key(0))
    tx, needs_factors = make(name, gmn_lopt.analyze(model.loss, params, batches[0]))

    def step(params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        return train_step(model.loss, tx, needs_factors, params, state, batch)[:2]

    # Donation needs every buffer once; an initial state may hold the same constant several times.
    state = jax.tree.map(lambda x: x.copy(), (params, jax.jit(tx.init)(params)))
    size, of_state = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in state)
    begin = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*state, batches[0]).compile()
    figures = {"optimizer": name, "compile_s": time.perf_counter() - begin, "state_bytes": of_state}
    figures |= {"parameters": size // 4}
    if (sizes := compiled.memory_analysis()) is not None:
        kept = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        figures |= {"temporary_bytes": sizes.temp_size_in_bytes, "peak_bytes": kept + sizes.temp_size_in_bytes}
    run = Run(compiled, state, batches)
    figures["first_s"] = [seconds(run.step) for _ in range(FIRST)]
    return figures, run


def measure(config: Config, model: Perceptron | Language, tokens: int) -> list[dict[str, Any]]:
    """Figures of each optimizer."""
    batches = [
        jax.block_until_ready(jax.jit(model.batch, static_argnums=1)(jax.random.key(i), tokens)) for i in range(BATCHES)
    ]
    runs = [prepare(name, model, batches) for name in config.optimizers]
    times = zip(*([seconds(run.step) for _, run in runs] for _ in range(config.steps)))
    figures = []
    for (figure, run), own in zip(runs, times):
        if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(run.state[0])):
            raise UsageError(f"{figure['optimizer']} has diverged: times would not be those of training")
        of_steps = {"mean_s": statistics.mean(own), "median_s": statistics.median(own), "slowest_s": max(own)}
        figures.append(figure | of_steps | {"step_s": list(own)})
    for figure in figures:
        figure["ratio"] = figure["mean_s"] / figures[0]["mean_s"]
    return figures


def line(model: str, tokens: int, f: dict[str, Any]) -> str:
    """A row of the table."""
    of_time = f"{f['mean_s'] * 1e3:,.1f} | {f['ratio']:.2f} | {f['median_s'] * 1e3:,.1f} | {f['slowest_s'] * 1e3:,.1f}"
    early = f"{max(f['first_s'][1:]) * 1e3:,.1f} | {f['compile_s']:.1f}"
    state = f"{f['state_bytes'] / f['parameters'] / 4:.1f}"
    memory = " | ".join(f"{f[name] / 1e6:,.1f}" if name in f else "" for name in ("temporary_bytes", "peak_bytes"))
    return (
        f"| {model} | {f['parameters']:,} | {tokens:,} | {f['optimizer']} | {of_time} | {early} | {state} | {memory} |"
    )


def main(config: Config, show: Callable[[str], Any] = print) -> list[dict[str, Any]]:
    """Measure, print the table as the figures come, and return the figures.

    Raises:
        UsageError: in one line, what cannot be measured.
    """
    if min(config.steps, *config.tokens) < 1 or not config.optimizers:
        raise UsageError("--steps and --tokens must be at least 1, and --optimizers one or more")
    for name in config.models:
        model = MODELS[name]
        if isinstance(model, Language) and any(tokens % model.length for tokens in config.tokens):
            raise UsageError(f"--tokens must be multiples of {model.length} for {name}, the length of its sequences")
    show(f"JAX {jax.__version__}, {describe_hardware()}; {config.steps} steps, times in ms, state in parameters, MB\n")
    show(
        "| model | parameters | tokens | optimizer | mean | ratio | median | slowest | slowest of 2-10 | compile (s) "
        "| state | temporaries | peak |"
    )
    show("|---" * 13 + "|")
    result = []
    for name in config.models:
        for tokens in config.tokens:
            for figure in measure(config, MODELS[name], tokens):
                show(line(name, tokens, figure))
                result.append({"model": name, "tokens": tokens} | figure)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "update.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    one_blas_thread()
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are among the figures
    try:
        main(parse(Config, __doc__))
    except UsageError as error:
        sys.exit(f"bench.update: {error}")
