"""How fast meta-training is, and the learned optimizers' time per training step beside Adam's.

python -m bench.meta_step [--tasks cifar10_mlp] [--estimators pes truncated] [--baseline] [--out DIR]

Models and batches are those of the tasks; images and tokens are synthetic arrays of their shapes. An inner step is one
training step of one unroll: a batch, the loss with its gradient (and factors), and the learned update. With
``--baseline`` each meta-step is timed in turn with the same one in its straightforward form (bench/straightforward.py,
all unrolls in one vmap). GFLOP/s are those of matrix products (counted in the jaxpr), per cent those of the rate of a
large float32 product in the same run. Prints a table of meta-steps and one of training steps (the paper's table 8).
"""

import json
import statistics
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from bench.measure import CLOCKS, matrix_product_rate, prepare, synthetic_task, time_in_turn
from bench.straightforward import Straightforward
from gmn_lopt.cli.command_line import parse
from gmn_lopt.evaluation.candidate import Candidate
from gmn_lopt.evaluation.timing import time_per_step
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
    clock: Literal["wall", "processor"] = "wall"
    """Seconds of the wall clock; or of processor time, summed over cores, for a machine that other work runs on."""
    out: Path | None = None
    """Directory for meta_step.json, all figures."""


def measure_meta_steps(
    config: Config, task: Task, lopt: LearnedOptimizer, estimator: str, rate: float
) -> list[dict[str, Any]]:
    """Figures of one estimator's meta-step: the library's, and before it the straightforward one if asked for."""
    clock = CLOCKS[config.clock]
    stage = Stage(estimator, pairs=config.pairs, truncation=config.truncation)
    cases = {"library": (TrainingProblem(task, lopt), stage)}
    if config.baseline:
        cases = {"straightforward": (TrainingProblem(task, Straightforward(lopt)), replace(stage, turns=1))} | cases
    phi = lopt.init(jax.random.key(0))
    runs = {name: prepare(stage.build(p), phi, p.splits(), clock) for name, (p, stage) in cases.items()}
    time_in_turn(list(runs.values()), config.repeats, clock)
    figures: list[dict[str, Any]] = []
    for name, run in runs.items():
        seconds = statistics.median(run.seconds)
        flops = run.flops / seconds
        figure: dict[str, Any] = {"form": name, "inner_steps_per_s": run.inner_steps / seconds, "flops_per_s": flops}
        figure |= {"of_matrix_product": flops / rate, "peak_memory_bytes": run.memory}
        figures.append(figure | {"compile_s": run.compile_seconds, "meta_step_s": run.seconds})
    for figure in figures:  # to the first, the straightforward form where that is measured
        figure["ratio"] = figure["inner_steps_per_s"] / figures[0]["inner_steps_per_s"]
    return figures


def measure_training_steps(config: Config, task: Task, lopts: dict[str, LearnedOptimizer]) -> list[dict[str, Any]]:
    """Seconds of one training step of Adam and of each learned optimizer, and their iterations relative to Adam's."""
    candidates = [Candidate("adam", "", "", lambda _: optax.adam(1e-3))]
    for name, lopt in lopts.items():
        phi = lopt.init(jax.random.key(0))
        candidates.append(Candidate(name, "", "", lopt.optimizer, phi, lopt.needs_factors))
    seconds = np.median(time_per_step(task, candidates, clock=CLOCKS[config.clock]).seconds, axis=1)
    pairs = zip(candidates, seconds)
    return [{"optimizer": c.name, "step_s": float(s), "relative": float(seconds[0] / s)} for c, s in pairs]


def main(config: Config) -> dict[str, Any]:
    """Measure, print the tables as the figures come, and return the figures.

    Raises:
        UsageError: in one line, what cannot be measured.
    """
    for field in fields(config):
        if type(value := getattr(config, field.name)) is int and value < 1:
            raise UsageError(f"--{field.name} must be at least 1")
    tasks = {name: synthetic_task(name) for name in config.tasks}
    try:
        lopts = {
            name: {optimizer: recipe(optimizer, task_structure(task)) for optimizer in config.optimizers}
            for name, task in tasks.items()
        }
        for lopt in (lopt for each in lopts.values() for lopt in each.values() if config.baseline):
            Straightforward(lopt)
    except ValueError as error:
        raise UsageError(f"--optimizers {' '.join(config.optimizers)}: {error}") from None
    rate = matrix_product_rate(CLOCKS[config.clock], config.repeats)
    devices = f"{jax.local_device_count()} {jax.devices()[0].platform} device(s)"
    setting = (
        f"JAX {jax.__version__}, {describe_hardware()}, {devices}; {config.pairs} pairs or unrolls, truncations of "
        f"{config.truncation} steps, {config.clock} seconds"
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
                        f"{f['peak_memory_bytes'] / 1e6:,.0f} | {f['compile_s']:.1f} |",
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
