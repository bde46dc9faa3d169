"""Train the methods: ``python -m experiments.curvature.train [--quick]``.

One run is a method, a number of networks to train on, and a seed; its result is a file in ``OUT/results``. Interrupted,
it goes on where it stopped: what is finished is not done again, and a run has a checkpoint after each validation, from
which it ends as it would have, bit for bit. ``python -m experiments.curvature.report`` writes what came out.
"""

import io
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
from jaxtyping import Array, Float, PyTree

import gmn_lopt
from experiments.curvature.data import DataConfig, Networks, factors_of, load, structure_of
from experiments.curvature.models import MODELS, SAVED, Inputs, count, standard
from gmn_lopt.cli.command_line import one_line_for_the_machine, parse
from gmn_lopt.util.errors import FileError, UsageError, first_line
from gmn_lopt.util.files import read_json, read_regular, write_atomically
from gmn_lopt.util.progress import progress

LARGEST = 2**28  # bytes of a checkpoint
CHUNK = 50  # networks that are evaluated at a time


@dataclass(frozen=True)
class Config:
    """What to train, and how. Defaults are the paper's setting (about 100 core hours); --quick is a small one."""

    out: Path = Path("runs/curvature")
    """Directory of the results."""
    cache: Path = Path("runs/data")
    """Directory of the data, which is made there."""
    quick: bool = False
    """Smaller networks and sets, fewer of them: about seven minutes on two cores."""
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


QUICK: dict[str, Any] = {
    "out": Path("runs/curvature-quick"),
    "sizes": (50, 1000),
    "seeds": (1,),
    "epochs": 60,
    "validate_every": 10,
    "data": DataConfig(width=8, points=32, train=1000, valid=200, test=200),
}


class State(NamedTuple):
    """Of one run: how far it is, and the best weights so far."""

    epoch: Array
    weights: PyTree
    optimizer: PyTree
    best: PyTree
    best_loss: Array


class Run:
    """One method on one set of networks.

    Attributes:
        losses: of the standard estimator, on the test set.
    """

    def __init__(self, config: Config, model: str, size: int, seed: int, splits: dict[str, Networks]) -> None:
        self.config, self.model, self.size, self.seed = config, model, size, seed
        self.structure = structure_of(config.data)
        self.single = structure_of(replace(config.data, points=1))
        self.module = MODELS[model](self.structure)
        order = jax.random.permutation(jax.random.key(1000 + seed), len(splits["train"].weights))[:size]
        self.splits = splits | {"train": Networks(*(x[order] for x in splits["train"]))}
        self.statistics = jax.jit(self._statistics)(self.splits["train"])
        self.optimizer = optax.adam(config.learning_rate)
        self.key = jax.random.key(seed)

    def init(self) -> State:
        """The state before the first epoch."""
        first = tuple(x[0] for x in self.splits["train"][:2])
        weights = jax.jit(lambda key: self.module.init(key, self.inputs(*first)))(self.key)["params"]
        return State(jnp.zeros((), int), weights, self.optimizer.init(weights), weights, jnp.asarray(jnp.inf))

    def _statistics(self, train: Networks) -> dict[str, Any]:
        """Means and deviations over the training set."""
        width = self.config.data.width

        def moments(weights: Array, inputs: Array) -> tuple[Any, Any]:
            factors = factors_of(weights, inputs, width)
            gradients = self.gradients(factors)
            seen = (factors, gradients, [g.mean(0) for g in gradients])
            return jax.tree.map(jnp.mean, seen), jax.tree.map(lambda x: jnp.mean(x**2), seen)

        first, second = jax.lax.map(lambda x: moments(*x), train[:2], batch_size=CHUNK)
        means = jax.tree.map(jnp.mean, first)

        def deviation(square: Array, mean: Array) -> Array:
            variance = square.mean() - mean**2
            return jnp.where(variance > 1e-6 * square.mean(), jnp.sqrt(jnp.maximum(variance, 0.0)), 1.0)

        return {
            "input": {"mean": means, "deviation": jax.tree.map(deviation, second, means)},
            "target": gmn_lopt.fit_standardization(train.targets),
        }

    def gradients(self, factors: gmn_lopt.Factors) -> list[Float[Array, "S ..."]]:
        """The gradient of each element, of each leaf."""
        each = jax.tree.map(lambda x: x[:, None], factors)  # sets of one element
        found: list[Array] = jax.vmap(lambda f: jax.tree.leaves(self.single.reconstruct(f)))(each)
        return found

    def inputs(self, weights: Float[Array, "P"], points: Float[Array, "S"]) -> Inputs:
        """What the methods see of one network."""
        factors = factors_of(weights, points, self.config.data.width)
        gradients = self.gradients(factors)
        seen = (factors, gradients, [g.mean(0) for g in gradients])
        of, target = self.statistics["input"], self.statistics["target"]
        read, each, mean = jax.tree.map(lambda x, m, d: (x - m) / d, seen, of["mean"], of["deviation"])
        squared = jax.tree.map(jnp.square, factors)

        def squares(w: Float[Array, "S"]) -> Float[Array, "P"]:
            weighted = gmn_lopt.Factors(squared.activations, tuple(g * w[:, None] for g in squared.tangents))
            found = jnp.concatenate([x.ravel() for x in jax.tree.leaves(self.structure.reconstruct(weighted))])
            return (found - target["mean"]) / target["deviation"]

        return Inputs(read, each, [m[None] for m in mean], squares)

    def loss(self, weights: PyTree | None, networks: Networks) -> Float[Array, "n"]:
        """The squared error on each network, in units of the target; without weights the standard estimator's."""

        def one(*network: Array) -> Array:
            inputs = self.inputs(*network[:2])
            found = standard(inputs) if weights is None else self.module.apply({"params": weights}, inputs)
            target = (network[2] - self.statistics["target"]["mean"]) / self.statistics["target"]["deviation"]
            return jnp.mean((found - target) ** 2)

        return jax.vmap(one)(*networks)

    def mean_loss(self, weights: PyTree | None, networks: Networks) -> Float[Array, ""]:
        """The mean over many networks."""
        losses = jax.lax.map(
            lambda x: self.loss(weights, jax.tree.map(lambda y: y[None], x))[0], networks, batch_size=CHUNK
        )
        return losses.mean()

    def epoch(self, state: State, train: Networks) -> State:
        """One pass over the training set; the last batch is filled up from its beginning."""
        batch = min(self.config.batch, self.size)
        steps = math.ceil(self.size / batch)
        order = jax.random.permutation(jax.random.fold_in(self.key, state.epoch), self.size)
        order = jnp.concatenate([order, order])[: steps * batch].reshape(steps, batch)

        def step(carry: tuple[PyTree, PyTree], index: Array) -> tuple[tuple[PyTree, PyTree], None]:
            weights, optimizer = carry
            networks = Networks(*(x[index] for x in train))
            gradient = jax.grad(lambda w: self.loss(w, networks).mean())(weights)
            updates, optimizer = self.optimizer.update(gradient, optimizer)
            return (optax.apply_updates(weights, updates), optimizer), None

        (weights, optimizer), _ = jax.lax.scan(step, (state.weights, state.optimizer), order)
        return state._replace(epoch=state.epoch + 1, weights=weights, optimizer=optimizer)

    def round(self, state: State, train: Networks, valid: Networks) -> State:
        """Epochs up to the next validation, and it."""
        state, _ = jax.lax.scan(lambda s, _: (self.epoch(s, train), None), state, length=self.config.validate_every)
        loss = self.mean_loss(state.weights, valid)
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
            state = advance(state, self.splits["train"], self.splits["valid"])
            store(checkpoint, state)
            bar.update()
        return state

    def save(self, path: Path, weights: PyTree) -> None:
        """Save a predictor that gmn_lopt.load_predictor reads, where the method is one."""
        if self.model in SAVED:
            mean, deviation = (self.statistics["input"][name][0] for name in ("mean", "deviation"))
            statistics = {"mean": (mean.activations, mean.tangents)}
            statistics["deviation"] = (deviation.activations, deviation.tangents)
            saved = {"network": weights["network"], "input": statistics, "target": self.statistics["target"]}
            gmn_lopt.save_predictor(path, SAVED[self.model], self.structure, saved)


def store(file: Path, state: State) -> None:
    """Write a checkpoint."""
    content = io.BytesIO()
    np.savez(content, *map(np.asarray, jax.tree.leaves(state)))
    write_atomically(file, content.getvalue())


def restore(file: Path, like: State) -> State:
    """Read a checkpoint of a state of this shape.

    Raises:
        FileError: in one line, it is none.
    """
    leaves, treedef = jax.tree.flatten(like)
    try:
        arrays = np.load(io.BytesIO(read_regular(file, LARGEST)), allow_pickle=False)
        found = [jnp.asarray(arrays[f"arr_{i}"]) for i in range(len(leaves))]
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise FileError(f"{file} is damaged; remove it to train from the beginning ({type(error).__name__})") from None
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
            run = Run(config, model, size, seed, splits)
            state = run.train(checkpoint, bar)
            test, reference = (jax.jit(run.mean_loss)(w, splits["test"]) for w in (state.best, None))
            found = {"model": model, "size": size, "seed": seed, "weights": count(state.best)}
            found |= {"test": float(test), "valid": float(state.best_loss), "standard": float(reference)}
            run.save(config.out / "predictors" / name, state.best)
            write_atomically(result, (json.dumps(found, indent=2) + "\n").encode())
            checkpoint.unlink(missing_ok=True)
            jax.clear_caches()


if __name__ == "__main__":
    try:
        with one_line_for_the_machine():
            main(parse(Config, __doc__))
    except (UsageError, FileError) as error:
        sys.exit(f"experiments.curvature.train: {first_line(error)}")
