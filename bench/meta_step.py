"""How fast meta-training is, and the learned optimizers' time per training step beside Adam's.

python -m bench.meta_step [--tasks cifar10_mlp] [--estimators pes truncated] [--baseline] [--out DIR]

Models and batches are those of the tasks; images and tokens are synthetic arrays of their shapes. An inner step is one
training step of one unroll: a batch, the loss with its gradient (and factors), and the learned update. With
``--baseline`` each meta-step is timed in turn with the same one in its straightforward form (bench/straightforward.py,
all unrolls in one vmap). GFLOP/s are those of matrix products (counted in the jaxpr), per cent those of the rate of a
large float32 product in the same run. Prints a table of meta-steps and one of training steps (the paper's table 8).
"""

import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from bench.measure import matrix_flops, matrix_product_rate, seconds, synthetic_task
from bench.straightforward import Straightforward
from gmn_lopt.cli.command_line import parse
from gmn_lopt.evaluation.timing import time_per_step
from gmn_lopt.evaluation.training import Candidate
from gmn_lopt.meta.estimator import Estimator
from gmn_lopt.meta.meta_step import MetaStep
from gmn_lopt.meta.stages import Stage
from gmn_lopt.meta.task import Task, task_structure
from gmn_lopt.meta.training_problem import TrainingProblem
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.optimizers.recipes import recipe
from gmn_lopt.util.errors import UsageError
from gmn_lopt.util.hardware import describe_hardware, use_all_cores
from gmn_lopt.util.threads import one_blas_thread


@dataclass(frozen=True)
class Config:
    """What to measure. Defaults are the paper's setting."""

    tasks: tuple[Literal["fashion_mnist_mlp", "cifar10_mlp", "cifar100_mlp", "lm1b_transformer"], ...] = (
        "fashion_mnist_mlp",
        "cifar10_mlp",
        "cifar100_mlp",
    )
    """Tasks whose model and batch to take."""
    estimators: tuple[Literal["pes", "nres", "es", "truncated"], ...] = ("pes", "nres", "es", "truncated")
    """Estimators of the meta-gradient; none: training steps only."""
    optimizers: tuple[str, ...] = ("ds", "ds+gmn")
    """Recipes of gmn_lopt/optimizers/recipes.py, such as unf+gmn, or denoised+ds+gmn with small networks."""
    baseline: bool = False
    """Whether to measure the straightforward form as well, which there is for ds and ds+gmn."""
    pairs: int = 16
    """Antithetic pairs of an evolution strategy, or unrolls of truncated."""
    truncation: int = 50
    """Inner steps in one truncation."""
    repeats: int = 5
    """Meta-steps timed; the median counts."""
    out: Path | None = None
    """Directory for meta_step.json, all figures."""


def prepare(estimator: Estimator, phi: PyTree, splits: PyTree) -> tuple[dict[str, Any], Callable[[], None]]:
    """Compile a meta-step and take the first; returns what it costs and a function that takes the next one.

    Memory is the peak on all devices of this process: what goes in, comes out and lies in between.
    """
    step = MetaStep(estimator, optax.adam(1e-4))
    data, key = step.place((splits, jax.random.key(1)))
    state = step.init(phi, data, key)
    figures: dict[str, Any] = {"flops": matrix_flops(estimator.estimate, phi, state.estimator, data, key)}
    begin = time.perf_counter()
    compiled = step.compile(state, data, key)
    figures["compile_s"] = time.perf_counter() - begin
    if (sizes := compiled.memory_analysis()) is not None:
        kept = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        figures["peak_memory_bytes"] = float(kept + sizes.temp_size_in_bytes) * jax.local_device_count()
    numbers = itertools.count()

    def take() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, data, key, np.uint32(next(numbers))))

    take()
    return figures, take


def measure_meta_steps(
    config: Config, task: Task, lopt: LearnedOptimizer, estimator: str, rate: float
) -> list[dict[str, Any]]:
    """Figures of one estimator's meta-step: the library's, and before it the straightforward one if asked for."""
    stage = Stage(estimator, pairs=config.pairs, truncation=config.truncation)
    cases = {"library": (TrainingProblem(task, lopt), stage)}
    if config.baseline:
        cases = {"straightforward": (TrainingProblem(task, Straightforward(lopt)), replace(stage, turns=1))} | cases
    phi = lopt.init(jax.random.key(0))
    estimators = {form: stage.build(problem) for form, (problem, stage) in cases.items()}
    runs = {form: prepare(estimators[form], phi, problem.splits()) for form, (problem, _) in cases.items()}
    # One meta-step of each after the other, so that a busy machine slows them alike.
    times = [[seconds(take) for _, take in runs.values()] for _ in range(config.repeats)]
    figures = []
    for (form, (figure, _)), own in zip(runs.items(), zip(*times)):
        median = statistics.median(own)
        flops = figure.pop("flops") / median
        figure |= {"form": form, "inner_steps_per_s": estimators[form].inner_steps / median, "flops_per_s": flops}
        figures.append(figure | {"of_matrix_product": flops / rate, "meta_step_s": list(own)})
    for figure in figures:  # to the first, the straightforward form where that is measured
        figure["ratio"] = figure["inner_steps_per_s"] / figures[0]["inner_steps_per_s"]
    return figures


def measure_training_steps(config: Config, task: Task, lopts: dict[str, LearnedOptimizer]) -> list[dict[str, Any]]:
    """Seconds of one training step of Adam and of each learned optimizer, and their iterations relative to Adam's."""
    key = jax.random.key(0)
    learned = [Candidate(name, "", "", o.optimizer, o.init(key), o.needs_factors) for name, o in lopts.items()]
    candidates = [Candidate("adam", "", "", lambda _: optax.adam(1e-3)), *learned]
    medians = np.median(time_per_step(task, candidates).seconds, axis=1)
    pairs = zip(candidates, medians)
    return [{"optimizer": c.name, "step_s": float(s), "relative": float(medians[0] / s)} for c, s in pairs]


def main(config: Config) -> dict[str, Any]:
    """Measure, print the tables as the figures come, and return the figures.

    Raises:
        UsageError: in one line, what cannot be measured.
    """
    for field in ("pairs", "truncation", "repeats"):
        if getattr(config, field) < 1:
            raise UsageError(f"--{field} must be at least 1")
    tasks = {name: synthetic_task(name) for name in config.tasks}
    lopts: dict[str, dict[str, LearnedOptimizer]] = {}
    try:
        for name, task in tasks.items():
            lopts[name] = {optimizer: recipe(optimizer, task_structure(task)) for optimizer in config.optimizers}
            if config.baseline:
                list(map(Straightforward, lopts[name].values()))
    except ValueError as error:
        raise UsageError(f"--optimizers {' '.join(config.optimizers)}: {error}") from None
    rate = matrix_product_rate(config.repeats)
    devices = f"{jax.local_device_count()} {jax.devices()[0].platform} device(s)"
    setting = (
        f"JAX {jax.__version__}, {describe_hardware()}, {devices}; {config.pairs} pairs or unrolls, truncations of "
        f"{config.truncation} steps"
    )
    print(f"{setting}; large float32 matrix product: {rate / 1e9:,.0f} GFLOP/s\n")
    print("| task | optimizer | estimator | form | inner steps/s | ratio | GFLOP/s | % | memory (MB) | compile (s) |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    result: dict[str, Any] = {"setting": setting, "matrix_product_flops_per_s": rate}
    result |= {"meta_steps": [], "training_steps": []}
    for name, task in tasks.items():
        for optimizer, lopt in lopts[name].items():
            for estimator in config.estimators:
                for f in measure_meta_steps(config, task, lopt, estimator, rate):
                    print(
                        f"| {name} | {optimizer} | {estimator} | {f['form']} | {f['inner_steps_per_s']:,.0f} | "
                        f"{f['ratio']:.2f} | {f['flops_per_s'] / 1e9:,.1f} | {100 * f['of_matrix_product']:.0f} | "
                        f"{f.get('peak_memory_bytes', math.nan) / 1e6:,.0f} | {f['compile_s']:.1f} |",
                        flush=True,
                    )
                    result["meta_steps"].append({"task": name, "optimizer": optimizer, "estimator": estimator} | f)
    print("\n| task | optimizer | microseconds per training step | iterations/s relative to Adam |\n|---|---|---|---|")
    for name, task in tasks.items():
        for f in measure_training_steps(config, task, lopts[name]):
            line = f"| {name} | {f['optimizer']} | {f['step_s'] * 1e6:,.0f} | {f['relative']:.2f} |"
            print(line, flush=True)
            result["training_steps"].append({"task": name} | f)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "meta_step.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    use_all_cores()
    one_blas_thread()
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are among the figures
    try:
        main(parse(Config, __doc__))
    except UsageError as error:
        sys.exit(f"bench.meta_step: {error}")
