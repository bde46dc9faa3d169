"""How fast meta-training is, and the learned optimizers' time per training step beside Adam's.

python bench/meta_step.py [--tasks cifar10_mlp] [--estimators pes truncated] [--baseline] [--out DIR]

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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tasks/, which is not part of the package

import jax
import numpy as np
import optax
from clocks import CLOCKS
from meta_step_measure import matrix_product_rate, prepare, synthetic_task, time_in_turn
from straightforward import Straightforward

from gmn_lopt import GradMetaNetConfig, LearnedOptimizer
from gmn_lopt.cli.command_line import parse
from gmn_lopt.evaluation.candidate import Candidate
from gmn_lopt.evaluation.timing import time_per_step
from gmn_lopt.meta.config import PRESETS
from gmn_lopt.meta.stages import Stage
from gmn_lopt.meta.task import Task, task_structure
from gmn_lopt.meta.training_problem import TrainingProblem
from gmn_lopt.util.hardware import describe_hardware
from meta_train import use_all_cores


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
    optimizers: tuple[Literal["sgdm", "ds", "ds+gmn", "unf", "unf+gmn"], ...] = ("ds", "ds+gmn")
    """Learned optimizers, sgdm is the base by itself; there is a straightforward form of ds and ds+gmn only."""
    size: Literal["paper", "small"] = "paper"
    """Their networks: the paper's (width 32), or those of ``meta_train.py --preset best`` (width 8, GradMetaNet of
    width 16 with one set layer on 32 elements of the set)."""
    width: int | None = None
    """Width of the per-parameter network, in place of the size's."""
    gmn_width: int | None = None
    """Width of GradMetaNet, in place of the size's."""
    set_size: int | None = None
    """Elements of the set that GradMetaNet reads, in place of the size's."""
    base: Literal["momentum", "adam", "muon", "denoised"] = "momentum"
    """Their base direction."""
    baseline: bool = False
    """Whether to measure the straightforward form as well."""
    pairs: int = 16
    """Antithetic pairs of an evolution strategy, or unrolls of truncated."""
    truncation: int = 50
    """Inner steps in one window."""
    repeats: int = 5
    """Meta-steps timed; the median counts."""
    clock: Literal["wall", "processor"] = "wall"
    """Seconds of the wall clock; or of processor time, summed over cores, for a machine that other work runs on."""
    out: Path | None = None
    """Directory for meta_step.json, all figures."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise SystemExit(f"--{field.name} must be at least 1")
        if self.baseline and not {*self.optimizers} <= {"ds", "ds+gmn"}:
            raise SystemExit("--baseline measures --optimizers ds and ds+gmn only")


def learned_optimizers(config: Config, task: Task) -> dict[str, LearnedOptimizer]:
    """The learned optimizers to measure, by name."""
    gradmetanet, plain = GradMetaNetConfig(), LearnedOptimizer(task_structure(task), gradmetanet=None, base=config.base)
    if config.size == "small":
        best = PRESETS["best"]
        gradmetanet, plain = best["gmn"], replace(plain, width=best["width"], hidden_layers=best["hidden_layers"])
    if config.gmn_width is not None:
        gradmetanet = replace(gradmetanet, width=config.gmn_width, product_width=config.gmn_width)
    gradmetanet = replace(gradmetanet, max_set_size=config.set_size or gradmetanet.max_set_size)
    plain = replace(plain, width=config.width or plain.width)
    parts = {name: name.partition("+") for name in config.optimizers}
    return {
        name: replace(plain, backbone=backbone, gradmetanet=gradmetanet if rest else None)
        for name, (backbone, _, rest) in parts.items()
    }


def measure_meta_steps(
    config: Config, task: Task, lopt: LearnedOptimizer, estimator: str, rate: float
) -> list[dict[str, Any]]:
    """Figures of one estimator's meta-step: the library's, and before it the straightforward one if asked for."""
    clock = CLOCKS[config.clock]
    stage = Stage(estimator, pairs=config.pairs, truncation=config.truncation)
    cases = {"library": (TrainingProblem(task, lopt), stage)}
    if config.baseline:
        plain = TrainingProblem(task, Straightforward(lopt)), replace(stage, turns=1)
        cases = {"straightforward": plain} | cases
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
    seconds = np.median(time_per_step(task, candidates, clock=CLOCKS[config.clock]), axis=1)
    pairs = zip(candidates, seconds)
    return [{"optimizer": c.name, "step_s": float(s), "relative": float(seconds[0] / s)} for c, s in pairs]


def main(config: Config) -> dict[str, Any]:
    """Measure, print the tables as the figures come, and return the figures."""
    rate = matrix_product_rate(CLOCKS[config.clock], config.repeats)
    devices = f"{jax.local_device_count()} {jax.devices()[0].platform} device(s)"
    changed = [
        f"{name} {getattr(config, name)}" for name in ("width", "gmn_width", "set_size") if getattr(config, name)
    ]
    networks = ", ".join([f"networks: {config.size}", *changed])
    head = f"JAX {jax.__version__}, {describe_hardware()}, {devices}; {networks}, base: {config.base}"
    setting = f"{config.pairs} pairs or unrolls, windows of {config.truncation} steps, {config.clock} seconds"
    print(f"{head}; {setting}; large float32 matrix product: {rate / 1e9:,.0f} GFLOP/s\n")
    print("| task | optimizer | estimator | form | inner steps/s | ratio | GFLOP/s | % | memory (MB) | compile (s) |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    result: dict[str, Any] = {"setting": f"{head}; {setting}", "matrix_product_flops_per_s": rate}
    result |= {"meta_steps": [], "training_steps": []}
    tasks = {name: synthetic_task(name) for name in config.tasks}
    for name, task in tasks.items():
        for optimizer, lopt in learned_optimizers(config, task).items():
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
        for f in measure_training_steps(config, task, learned_optimizers(config, task)):
            line = f"| {name} | {f['optimizer']} | {f['step_s'] * 1e6:,.0f} | {f['relative']:.2f} |"
            print(line, flush=True)
            result["training_steps"].append({"task": name} | f)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "meta_step.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    use_all_cores()
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are among the figures
    main(parse(Config, __doc__))
