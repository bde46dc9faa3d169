"""Train the methods: ``python -m experiments.curvature.train [--quick]``.

One run is a method, a number of networks to train on, and a seed; its result is a file in ``OUT/results``. Interrupted,
it goes on where it stopped: what is finished is not done again, and a run has a checkpoint after each validation, from
which it ends as it would have, bit for bit. ``python -m experiments.curvature.report`` writes what came out.
"""

import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import gmn_lopt
from experiments.curvature.data import DataConfig, Networks, load
from experiments.curvature.models import MODELS, SAVED, count
from experiments.curvature.problem import Problem, drawn
from gmn_lopt.cli.command_line import one_line_for_the_machine, parse
from gmn_lopt.util.arrays import read_arrays, write_arrays
from gmn_lopt.util.compilation_cache import keep_compiled
from gmn_lopt.util.errors import FileError, UsageError, first_line
from gmn_lopt.util.files import read_json, write_atomically
from gmn_lopt.util.progress import progress


@dataclass(frozen=True)
class Config:
    """What to train, and how. Defaults are the paper's setting, for an accelerator; --quick is a small one."""

    out: Path = Path("runs/curvature")
    """Directory of the results."""
    cache: Path = Path("runs/data")
    """Directory of the data, which is made there."""
    quick: bool = False
    """Smaller networks, sets of few gradients, less training."""
    models: tuple[str, ...] = ()
    """Methods by name; none: all."""
    sizes: tuple[int, ...] = (10, 30, 100, 300, 1000, 2000)
    """Numbers of networks to train on."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Of weights, of the order of training, and of which networks are trained on."""
    epochs: int = 100
    """Passes over the training set."""
    batch: int = 32
    """Networks in a step."""
    learning_rate: float = 1e-3
    """Adam's."""
    validate_every: int = 5
    """Epochs between two validations; the weights of the best one are tested."""
    data: DataConfig = field(default_factory=DataConfig)
    """What the data are."""


# So few gradients of each network that little training tells the methods from the standard estimator.
QUICK: dict[str, Any] = {
    "out": Path("runs/curvature-quick"),
    "sizes": (100, 2000),
    "seeds": (1,),
    "epochs": 40,
    "validate_every": 10,
    "data": DataConfig(width=8, points=4, train=2000, valid=500, test=500),
}


class State(NamedTuple):
    """Of one run: how far it is, and the best weights so far."""

    epoch: Array
    weights: PyTree
    optimizer: PyTree
    best: PyTree
    best_loss: Array


class Run:
    """One method on one training set."""

    def __init__(self, config: Config, model: str, seed: int, problem: Problem, valid: Networks) -> None:
        self.config, self.problem, self.valid = config, problem, valid
        self.module = MODELS[model](problem.structure)
        self.optimizer = optax.adam(config.learning_rate)
        self.key = jax.random.key(seed)

    def init(self) -> State:
        """The state before the first epoch."""
        first = self.problem.train.weights[0], self.problem.train.inputs[0]
        weights = jax.jit(lambda key: self.module.init(key, self.problem.inputs(*first)))(self.key)["params"]
        return State(jnp.zeros((), int), weights, self.optimizer.init(weights), weights, jnp.asarray(jnp.inf))

    def epoch(self, state: State, train: Networks) -> State:
        """One pass over the training set; the last batch is filled up from its beginning."""
        size = len(train.weights)
        batch = min(self.config.batch, size)
        steps = math.ceil(size / batch)
        order = jax.random.permutation(jax.random.fold_in(self.key, state.epoch), size)
        order = jnp.concatenate([order, order])[: steps * batch].reshape(steps, batch)

        def step(carry: tuple[PyTree, PyTree], index: Array) -> tuple[tuple[PyTree, PyTree], None]:
            weights, optimizer = carry
            networks = Networks(*(x[index] for x in train))
            gradient = jax.grad(lambda w: self.problem.loss(self.module, w, networks).mean())(weights)
            updates, optimizer = self.optimizer.update(gradient, optimizer)
            return (optax.apply_updates(weights, updates), optimizer), None

        (weights, optimizer), _ = jax.lax.scan(step, (state.weights, state.optimizer), order)
        return state._replace(epoch=state.epoch + 1, weights=weights, optimizer=optimizer)

    def round(self, state: State, train: Networks, valid: Networks) -> State:
        """Epochs up to the next validation, and it."""
        state, _ = jax.lax.scan(lambda s, _: (self.epoch(s, train), None), state, length=self.config.validate_every)
        loss = self.problem.mean_loss(self.module, state.weights, valid)
        better = loss < state.best_loss
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), state.weights, state.best)
        return state._replace(best=best, best_loss=jnp.where(better, loss, state.best_loss))

    def train(self, checkpoint: Path, bar: Any) -> State:
        """Train from the checkpoint, or from the beginning."""
        state = self.init()
        if checkpoint.exists():
            state = restore(checkpoint, state)
        advance = jax.jit(self.round)
        rounds = math.ceil(self.config.epochs / self.config.validate_every)
        bar.update(done := int(state.epoch) // self.config.validate_every)
        for _ in range(done, rounds):
            state = advance(state, self.problem.train, self.valid)
            store(checkpoint, state)
            bar.update()
        return state


def store(file: Path, state: State) -> None:
    """Write a checkpoint."""
    write_arrays(file, {f"arr_{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))})


def restore(file: Path, like: State) -> State:
    """Read a checkpoint of a state of this shape.

    Raises:
        FileError: in one line, it is none.
    """
    leaves, treedef = jax.tree.flatten(like)
    try:
        arrays = read_arrays(file)
        found = [jnp.asarray(arrays[f"arr_{i}"]) for i in range(len(leaves))]
    except (FileError, LookupError, TypeError, ValueError) as error:
        raise FileError(f"{file} is damaged; remove it to train from the beginning ({first_line(error)})") from None
    if [x.shape for x in found] != [x.shape for x in leaves]:
        raise FileError(f"{file} belongs to another setting; remove it, or choose another --out")
    restored: State = jax.tree.unflatten(treedef, found)
    return restored


def name_of(model: str, size: int, seed: int) -> str:
    """The name of a run's files."""
    return f"{re.sub('[^a-z+]+', '_', model)}-{size}-{seed}"


def checked(config: Config) -> Config:
    """The setting with what --quick changes, and all methods where none is named.

    Raises:
        UsageError: in one line, what cannot be trained.
    """
    if config.quick:
        changed: dict[str, Any] = {f: getattr(config, f) for f in QUICK if getattr(config, f) != getattr(Config(), f)}
        config = replace(config, **(QUICK | changed))
    if unknown := [m for m in config.models if m not in MODELS]:
        raise UsageError(f"there is no method {unknown[0]!r}: choose of {'; '.join(MODELS)}")
    numbers = {**{k: v for k, v in asdict(config).items() if isinstance(v, int)}, **asdict(config.data)}
    numbers |= {f"sizes {size}": size for size in config.sizes}
    if bad := [k for k, v in numbers.items() if k not in ("seed", "quick") and v < 1]:
        raise UsageError(f"{bad[0]} must be at least 1")
    if not config.sizes or not config.seeds or config.learning_rate <= 0:
        raise UsageError("--sizes and --seeds must not be empty, and --learning-rate positive")
    if max(config.sizes) > config.data.train:
        raise UsageError(f"--sizes {max(config.sizes)} is more than the {config.data.train} networks for training")
    return replace(config, models=config.models or tuple(MODELS))


def claim(config: Config) -> None:
    """Make the directory of the results, or see that it is one of the same setting.

    Raises:
        UsageError: it belongs to another setting.
    """
    (config.out / "results").mkdir(parents=True, exist_ok=True)
    kept = ("epochs", "batch", "learning_rate", "validate_every", "data")
    setting = {name: value for name, value in asdict(config).items() if name in kept}
    file = config.out / "setting.json"
    if not file.exists():
        write_atomically(file, (json.dumps(setting, indent=2) + "\n").encode())
    elif (there := read_json(file)) != setting:
        different = next(name for name in kept if there.get(name) != setting[name])
        raise UsageError(f"{config.out} holds results with another {different}: choose another --out, or remove it")


def runs(config: Config) -> Iterator[tuple[int, int, str]]:
    """Seeds, sizes and methods, in the order in which they are trained: all methods with the first seed first."""
    return itertools.product(config.seeds, config.sizes, config.models)


def main(config: Config) -> None:
    """Train what is not yet trained.

    Raises:
        UsageError, FileError: in one line, what is wrong.
    """
    config = checked(config)
    claim(config)
    splits = load(config.data, config.cache)
    valid, test = splits["valid"], splits["test"]
    problem, of = None, None
    rounds = math.ceil(config.epochs / config.validate_every)
    todo = list(runs(config))
    with progress(len(todo) * rounds, "curvature", "rounds") as bar:
        for seed, size, model in todo:
            name = name_of(model, size, seed)
            result, checkpoint = config.out / "results" / f"{name}.json", config.out / f"{name}.npz"
            if result.exists():
                bar.update(rounds)
                continue
            bar.set_description(f"{model}, {size} networks, seed {seed}")
            if problem is None or of != (seed, size):
                problem, of = Problem(config.data, drawn(splits, size, seed)), (seed, size)
            run = Run(config, model, seed, problem, valid)
            state = run.train(checkpoint, bar)
            loss = jax.jit(problem.mean_loss, static_argnums=0)
            found = {"model": model, "size": size, "seed": seed, "weights": count(state.best)}
            found |= {"test": float(loss(run.module, state.best, test)), "valid": float(state.best_loss)}
            found |= {"standard": float(loss(None, None, test))}
            if model in SAVED:
                weights = problem.predictor_weights(state.best["network"])
                gmn_lopt.save_predictor(config.out / "predictors" / name, SAVED[model], problem.structure, weights)
            write_atomically(result, (json.dumps(found, indent=2) + "\n").encode())
            checkpoint.unlink(missing_ok=True)
            jax.clear_caches()


if __name__ == "__main__":
    try:
        with one_line_for_the_machine():
            config = parse(Config, __doc__)
            keep_compiled()
            main(config)
    except (UsageError, FileError) as error:
        sys.exit(f"experiments.curvature.train: {first_line(error)}")
