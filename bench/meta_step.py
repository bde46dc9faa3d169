"""Inner steps per second of meta-training, and the learned optimizers' time per step beside Adam's.

python bench/meta_step.py [--pairs 16] [--truncation 50] [--repeats 5]

The model and batch are those of ``fashion_mnist_mlp`` (64-32-10, 128 images); the images are synthetic arrays of the
same shapes, so nothing is downloaded. An inner step is one training step of one unroll: a batch, the loss with its
gradient (and factors), and the learned update; one meta-step of PES takes ``2 x pairs x truncation`` of them.
"""

import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tasks/, which is not part of the package

import jax
import numpy as np
import optax
import tyro

from gmn_lopt import GradMetaNetConfig, LearnedOptimizer
from gmn_lopt.evaluation.candidate import Candidate
from gmn_lopt.evaluation.timing import time_per_step
from gmn_lopt.meta.meta_step import MetaStep
from gmn_lopt.meta.pes import PES
from gmn_lopt.meta.task import Task, task_structure
from gmn_lopt.meta.training_problem import TrainingProblem
from meta_train import use_all_cores
from tasks import fashion_mnist_mlp


@dataclass(frozen=True)
class Config:
    """What to measure. Defaults are the paper's setting."""

    pairs: int = 16
    """Antithetic pairs of PES."""
    truncation: int = 50
    """Inner steps in one window."""
    repeats: int = 5
    """Meta-steps timed; the median counts."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise SystemExit(f"--{field.name} must be at least 1")


def synthetic_task() -> Task:
    """``fashion_mnist_mlp`` on random images."""
    rng = np.random.default_rng(0)
    split = {
        "image": rng.uniform(size=(48_000, 64)).astype(np.float32),
        "label": rng.integers(0, 10, 48_000).astype(np.int32),
    }
    fashion_mnist_mlp.load_images = lambda *_: {"train": split, "valid": split, "test": split}
    return fashion_mnist_mlp.make()


def measure_meta_step(task: Task, lopt: LearnedOptimizer, config: Config) -> tuple[float, float, float, float]:
    """Inner steps per second, seconds to compile, MB of inner states and MB of peak temporary memory."""
    problem = TrainingProblem(task, lopt)
    estimator = PES(problem, config.pairs, config.truncation)
    step = MetaStep(estimator, optax.adam(1e-4))
    data, key = step.place((problem.splits(), jax.random.key(1)))
    state = step.init(lopt.init(jax.random.key(0)), data, key)
    begin = time.perf_counter()
    compiled = step.compile(state, data, key)
    compilation = time.perf_counter() - begin
    seconds = []
    for number in range(config.repeats + 1):
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, data, key, np.uint32(number)))
        seconds.append(time.perf_counter() - begin)
    inner = sum(leaf.nbytes for leaf in jax.tree.leaves(state.estimator.inner)) / 1e6
    memory = compiled.memory_analysis()
    temporary = float("nan") if memory is None else memory.temp_size_in_bytes / 1e6
    return estimator.inner_steps / statistics.median(seconds[1:]), compilation, inner, temporary


def main(config: Config) -> None:
    """Measure and print both tables."""
    task = synthetic_task()
    structure = task_structure(task)
    small = GradMetaNetConfig(width=16, set_layers=1, product_width=16)
    optimizers = {
        "ds": LearnedOptimizer(structure, gradmetanet=None),
        "ds+gmn": LearnedOptimizer(structure),
        "ds+gmn (width 16, 1 set layer)": LearnedOptimizer(structure, gradmetanet=small),
    }
    device = f"{jax.local_device_count()} {jax.devices()[0].device_kind} device(s)"
    print(f"JAX {jax.__version__}, {device}; PES, {config.pairs} pairs, windows of {config.truncation} steps\n")
    print("| optimizer | inner steps/s | compile (s) | inner states (MB) | temporary memory (MB) |")
    print("|---|---|---|---|---|")
    for name, lopt in optimizers.items():
        rate, compilation, inner, temporary = measure_meta_step(task, lopt, config)
        print(f"| {name} | {rate:,.0f} | {compilation:.1f} | {inner:.1f} | {temporary:.1f} |", flush=True)

    candidates = [Candidate("adam", "", "", lambda _: optax.adam(1e-3))]
    for name, lopt in optimizers.items():
        phi = lopt.init(jax.random.key(0))
        candidates.append(Candidate(name, "", "", lopt.optimizer, phi, lopt.needs_factors))
    times = np.median(time_per_step(task, candidates), axis=1)
    print("\n| optimizer | microseconds per training step | relative to Adam |\n|---|---|---|")
    for candidate, seconds in zip(candidates, times):
        print(f"| {candidate.name} | {seconds * 1e6:,.0f} | {seconds / times[0]:.2f} |")


if __name__ == "__main__":
    use_all_cores()
    main(tyro.cli(Config, description=__doc__))
