"""Meta-train a learned optimizer on a task.

python meta_train.py --task digits_mlp --optimizer ds+gmn --out runs/digits

Interrupt it at any time (Ctrl-C or SIGTERM: it finishes the meta-step, saves and exits with code 0) and continue with
python meta_train.py --out runs/digits --resume

Several processes, on one machine or on many, compute one run together: one command each, with --coordinator HOST:PORT
--processes N --process-id I. See README.md.

The defaults are those of --preset best: what docs/meta_training.md found to learn fastest, a matter of minutes.
--preset paper is the paper's protocol: one stage of PES, 16 pairs, windows of 50 steps, Adam at 1e-4 for 50,000
meta-steps. Flags change single settings of either.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, PyTree
from tqdm import tqdm

from gmn_lopt.command_line import parse
from gmn_lopt.errors import first_line
from gmn_lopt.gradmetanet import GradMetaNetConfig
from gmn_lopt.hardware import describe_hardware
from gmn_lopt.learned_optimizer import LearnedOptimizer
from gmn_lopt.meta.augmentation import AugmentedProblem
from gmn_lopt.meta.averaging import averaged
from gmn_lopt.meta.meta_step import MetaStep
from gmn_lopt.meta.mixture import MixedMetaStep, MixtureProblem
from gmn_lopt.meta.processes import Processes, ProcessesError, connected
from gmn_lopt.meta.run_directory import RunDirectory, RunError, read_settings
from gmn_lopt.meta.sharding import unroll_shardings
from gmn_lopt.meta.shared_run import SharedRunDirectory
from gmn_lopt.meta.stages import Stage, parse_stages
from gmn_lopt.meta.task import Task, task_structure
from gmn_lopt.meta.training_problem import TrainingProblem
from gmn_lopt.serialization import SerializationError, load_learned, save
from tasks import load_task
from tasks._mixture import make_all

BACKBONES = ("ds", "unf", "celo")
OPTIMIZERS = ("sgdm", *(f"{backbone}{rest}" for backbone in BACKBONES for rest in ("", "+gmn", "+gmn++")))
ATTENTION_HEADS = 4  # of gmn++, where --gmn.attention-heads does not say
MIXTURE = "mixture"
# Settings of the learned optimizer that the configuration has under the same name.
ARCHITECTURE = [
    "base",
    "width",
    "hidden_layers",
    "rule",
    "orthogonalize",
    "gate",
    "decay",
    "bound",
    "learning_rate",
    "output_scale",
]
INITIAL_COEFFICIENTS = ("initial_alpha", "initial_beta", "initial_tau", "initial_power")
RUN_AHEAD = 4  # meta-steps that may be in flight on the device before the host waits


@dataclass(frozen=True)
class Config:
    """Settings of a run. Those that the result depends on are fixed once it has begun.

    The defaults here are the paper's; on the command line they are those of ``PRESETS``.
    """

    task: str
    """Name of a file in tasks/, without .py; or mixture, all those of tasks/_mixture.py, with learning rates, schedules
    and the scale of every tensor drawn at random (for --rule normalized)."""
    out: Path
    """Directory of the run."""
    optimizer: Literal[
        "sgdm", "ds", "ds+gmn", "ds+gmn++", "unf", "unf+gmn", "unf+gmn++", "celo", "celo+gmn", "celo+gmn++"
    ] = "ds+gmn"
    """What to train: sgdm (learned coefficients only), ds (a per-parameter network), unf (a universal neural
    functional: its last layer mixes all parameters; it fits this model alone, in any widths), celo (ds on features that
    know neither scale nor time), each but sgdm also with GradMetaNet (+gmn) or GradMetaNet++ (+gmn++, which
    attends over the set and the neurons and is slow)."""
    data_dir: str | None = None
    """Directory of data sets (TensorFlow Datasets' layout); default: its own."""
    preset: Literal["best", "paper"] = "paper"
    """Where the defaults of all other flags come from; on the command line, best."""
    resume: bool = False
    """Continue the run in --out, with its settings; nothing else has to be given again."""
    seed: int = 0
    """Seed of all randomness."""
    start: str | None = None
    """Saved or shipped optimizer whose meta-parameters to start from; its architecture must be the one asked for."""

    stages: str = "pes"
    """Stages, separated by commas: ESTIMATOR[:META_STEPS[:META_LEARNING_RATE]][:SETTING=VALUE...], for example
    truncated:300:3e-3:K=25:n=8,pes. Estimators are pes, nres (one perturbation for a whole inner problem), es
    (truncated evolution strategies) and truncated (back-propagation). Settings are K (truncation), n (pairs), sigma,
    clip, schedule and objective; what a stage does not say of these is taken from the flags below. Of a stage only:
    coefficient_sigma (sigma of the scalar coefficients), shaping (of the loss differences: none, ranks or clip),
    warmup (meta-steps), weight_decay (AdamW), coefficient_rate (times the meta-learning rate, for the scalar
    coefficients), ema (decay of an average of the meta-parameters, which is then what the stage saves and hands on)."""
    meta_steps: int = 50_000
    """Meta-steps of a stage."""
    meta_learning_rate: float = 1e-4
    """Learning rate of the meta-optimizer, Adam."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Meta-learning rate over a stage: constant, or a cosine or a line down to 0."""
    meta_clip: float = 1.0
    """Largest global norm of the meta-gradient; it is clipped to it."""
    truncation: int = 50
    """Inner steps K in one window; must divide the horizon."""
    pairs: int = 16
    """Antithetic pairs of unrolls in pes, nres and es; single unrolls in truncated."""
    sigma: float = 0.01
    """Standard deviation of the perturbations in pes, nres and es."""
    unroll_clip: float = 1.0
    """Largest norm of one unroll's gradient in truncated."""
    objective: Literal["mean", "final"] = "mean"
    """Meta-objective: mean of the inner losses along the trajectory, or the loss at its last step only."""
    meta_loss: Literal["train", "validation"] = "train"
    """Batch that the meta-objective is taken on: the one trained on, or one of the split that is never trained on."""
    horizon: int | None = None
    """Inner steps T of one inner problem; default: the task's."""

    base: Literal["momentum", "adam", "muon", "whitened"] = "momentum"
    """Direction that the learned part is added to."""
    rule: Literal["additive", "normalized"] = "additive"
    """How direction and learned part make a step; normalized: of a size that only the learning rate sets."""
    orthogonalize: bool = False
    """Whether the normalized rule orthogonalises the steps of kernels, as Muon does."""
    gate: bool = False
    """Whether the network also scales the step, entry by entry: a learned schedule."""
    decay: bool = False
    """Whether alpha falls as alpha (1 + step / tau)^-power, with learned tau and power, in the additive rule."""
    bound: float | None = None
    """Largest size of the learned part relative to the direction, in the additive rule; default: none."""
    learning_rate: float = 1e-3
    """Learning rate of the normalized rule."""
    output_scale: float = 1.0
    """What the last layer of the per-parameter network is multiplied by at the start; 0: the direction by itself."""
    initial_alpha: float | None = None
    """What alpha, the learning rate of the whole update, starts at; default: by base, 0.1, 0.001 or 0.03."""
    initial_beta: float | None = None
    """What beta, the weight of the network's part, starts at; default: by base, 0.001, 0.1 or 0.01; normalized, 0.1."""
    initial_tau: float | None = None
    """What tau, in steps, starts at; default: 30."""
    initial_power: float | None = None
    """What power starts at; default: 1."""
    width: int = 32
    """Width of the hidden layers of the per-parameter network."""
    hidden_layers: int = 3
    """Number of hidden layers of the per-parameter network."""
    gmn: GradMetaNetConfig = dataclasses.field(default_factory=GradMetaNetConfig)
    """Architecture of GradMetaNet."""

    log_every: int = 10
    """Meta-steps between rows of metrics; each row averages the meta-steps since the last."""
    checkpoint_every: int = 500
    """Meta-steps between checkpoints."""
    keep: int = 3
    """Number of latest checkpoints to keep."""
    keep_every: int = 10
    """Every how manyth checkpoint is kept for good."""

    coordinator: str | None = None
    """For a run over several processes, HOST:PORT at which process 0 listens, the same for all of them; auto takes all
    three settings from the cluster's environment (SLURM, Open MPI, TPU pods)."""
    processes: int | None = None
    """Number of processes; they share the pairs evenly."""
    process_id: int | None = None
    """Which of the processes this is, from 0."""


# How the run is spread is asked for each time; a resumed run need not be spread like before.
SPREAD = ("coordinator", "processes", "process_id")
# What a run may be resumed with other values of: none of it changes the meta-parameters that result.
FREE = ("out", "data_dir", "resume", "log_every", "checkpoint_every", "keep", "keep_every")


PRESETS: dict[str, dict[str, Any]] = {
    "best": {
        "base": "whitened",
        "decay": True,
        "width": 8,
        "hidden_layers": 2,
        "output_scale": 0.0,
        "initial_alpha": 0.06,
        "initial_beta": 0.01,
        "initial_tau": 30.0,
        "initial_power": 0.9,
        "gmn": GradMetaNetConfig(width=16, set_layers=1, product_width=16, max_set_size=32),
        "stages": "truncated:40:3e-3:K=100:n=4:schedule=cosine:clip=0.1:coefficient_rate=0",
        "checkpoint_every": 10,
    },
    "paper": {},
}
"""What each preset changes of ``Config``."""


class UsageError(ValueError):
    """The configuration asks for something that cannot be done. The message is one line."""


def main(config: Config) -> bool:
    """Meta-train; show progress on stderr.

    Returns:
        True when the run is complete, False when a signal ended it early (continue with ``resume=True``).

    Raises:
        UsageError, RunError, ProcessesError: in one line, what cannot be done.
    """
    stop = StopSignal()
    with stop.listen(), connected(config.coordinator, config.processes, config.process_id) as processes:
        stages = make_stages(config)
        lopt, problem = make_problem(config)
        if not config.resume:
            read_start(config, lopt)  # so that a wrong one is refused before there is a run directory
        try:
            meta_steps = [stage.meta_step(problem, config.meta_clip) for stage in stages]
            for meta_step in meta_steps:
                unroll_shardings(meta_step.parallel)
        except ValueError as error:
            raise UsageError(str(error)) from None
        run = open_run(config, processes)
        try:
            if run.complete:
                if processes.first:
                    print(f"{config.out} is complete: {sum(stage.meta_steps for stage in stages)} meta-steps")
                return True
            return train(config, run, lopt, problem, list(zip(stages, meta_steps)), stop, processes)
        finally:
            run.close()


def make_stages(config: Config) -> tuple[Stage, ...]:
    """The stages that the configuration asks for."""
    for name in ("log_every", "checkpoint_every", "keep", "keep_every", "meta_clip", "width", "learning_rate"):
        if not getattr(config, name) > 0:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be positive")
    for name in INITIAL_COEFFICIENTS:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be positive")
    try:
        default = Stage(
            "pes",
            config.meta_steps,
            config.meta_learning_rate,
            config.schedule,
            config.truncation,
            config.pairs,
            config.sigma,
            config.unroll_clip,
            config.objective,
        )
        return parse_stages(config.stages, default)
    except ValueError as error:
        raise UsageError(str(error)) from None


def make_problem(config: Config) -> tuple[LearnedOptimizer, TrainingProblem | MixtureProblem]:
    """The learned optimizer, and the training of the task, or of all tasks of the mixture, with it."""
    if config.optimizer not in OPTIMIZERS:
        raise UsageError(f"unknown --optimizer {config.optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")
    try:
        if config.task != MIXTURE:
            task = load_task(config.task, config.data_dir)
            lopt = make_lopt(config, task)
            return lopt, TrainingProblem(task, lopt, config.meta_loss, config.horizon)
        tasks = make_all(config.data_dir)
        lopts = [make_lopt(config, task) for task in tasks]
        if len({lopt.tied_leaves for lopt in lopts}) > 1:
            raise ValueError("unf belongs to one model, but the tasks have several; train ds or ds+gmn on all of them")
        parts = [TrainingProblem(t, lopt, config.meta_loss, config.horizon) for t, lopt in zip(tasks, lopts)]
        # A task's cap is 1.5 times the loss of knowing nothing: relative to it, all tasks count alike.
        weights = tuple(1.5 / task.loss_cap for task in tasks)
        return lopts[0], MixtureProblem(tuple(AugmentedProblem(part) for part in parts), weights)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise UsageError(f"--task {config.task}: {first_line(error)}") from error


def make_lopt(config: Config, task: Task) -> LearnedOptimizer:
    """The learned optimizer for a task's model."""
    backbone, _, rest = config.optimizer.partition("+")
    gmn = config.gmn
    if rest == "gmn++" and not gmn.attention_heads:
        gmn = dataclasses.replace(gmn, attention_heads=ATTENTION_HEADS)
    return LearnedOptimizer(
        structure=task_structure(task),
        backbone=backbone,
        gradmetanet=gmn if rest else None,
        **{name: getattr(config, name) for name in ARCHITECTURE},
    )


def open_run(config: Config, processes: Processes) -> RunDirectory | SharedRunDirectory:
    """Open or begin the run in ``config.out``."""
    packages = ("gmn_lopt", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}
    versions["hardware"] = describe_hardware()
    settings = to_json(config)
    keep_period = config.keep_every * config.checkpoint_every

    def begin() -> RunDirectory:
        return RunDirectory(config.out, settings, versions, config.resume, FREE, config.keep, keep_period)

    if processes.count == 1:
        return begin()
    local = ("out", "data_dir", "resume")
    processes.check_same(json.dumps({name: value for name, value in settings.items() if name not in local}))
    return SharedRunDirectory(config.out, processes, begin)


def train(
    config: Config,
    run: RunDirectory | SharedRunDirectory,
    lopt: LearnedOptimizer,
    problem: TrainingProblem | MixtureProblem,
    stages: Sequence[tuple[Stage, MetaStep | MixedMetaStep]],
    stop: "StopSignal",
    processes: Processes,
) -> bool:
    """Go through the stages, from the latest checkpoint on; return whether all are done."""
    key = jax.random.key(config.seed)
    phi = initial_phi(config, lopt, jax.random.fold_in(key, 0), run.latest == 0)
    total = sum(stage.meta_steps for stage, _ in stages)
    weights = sum(leaf.size for leaf in jax.tree.leaves(phi))
    if processes.first:
        print(
            f"{config.optimizer} on {config.task}: {weights} meta-parameters, {total} meta-steps, horizon "
            f"{problem.horizon}, {jax.device_count()} {jax.default_backend()} device(s), run directory {run.path}",
            file=sys.stderr,
        )
    if processes.first and run.latest == 0 and len(stages) > 1:
        save_optimizer(run.path / "stages" / "0-start", lopt, phi)
    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        initial=run.latest,
        mininterval=0.2 if terminal else 10,
        dynamic_ncols=terminal,
        disable=not processes.first,
    ) as bar:
        begin = 0
        for index, (stage, meta_step) in enumerate(stages):
            name, end = f"{index + 1}-{stage.estimator}", begin + stage.meta_steps
            if run.latest > end:
                begin = end
                continue
            bar.set_description(f"{name}, compiling")
            init_key, step_key = jax.random.split(jax.random.fold_in(key, index + 1))
            data, step_key = meta_step.place((problem.splits(), step_key))
            state, step = meta_step.init(phi, data, init_key), begin
            if run.latest > begin:
                state, step = run.restore(state), run.latest
            pending: list[dict[str, Array]] = []  # metrics of the meta-steps since the last row, still on the device
            timed, clock = 0, math.nan  # number of meta-steps since the clock was started
            to_compile = meta_step.programs
            stopping = processes.agree(stop.requested)
            while step < end and not stopping:
                state, metrics = meta_step(state, data, step_key, step)
                pending.append(metrics)
                # The device shall not wait for the host, but meta-steps shall not queue up without bound either.
                jax.block_until_ready(pending[-RUN_AHEAD:][0])
                if to_compile:  # compiling does not count
                    jax.block_until_ready(metrics)
                    to_compile, timed, clock = to_compile - 1, 0, time.perf_counter()
                else:
                    timed += 1
                step += 1
                bar.set_description(name, refresh=False)
                bar.update()
                processes.reached(step)
                stopping = processes.agree(stop.requested)
                saving = stopping or step == end or step % config.checkpoint_every == 0
                if saving or step % config.log_every == 0:
                    row = average(jax.device_get(pending), stage.truncation, problem.horizon // stage.truncation)
                    row |= {name: float(value) for name, value in lopt.scalars(jax.device_get(state.phi)).items()}
                    rate = timed * meta_step.inner_steps / (time.perf_counter() - clock) if timed else math.nan
                    run.log({"meta_step": step, "stage": name, **row, "inner_steps_per_second": rate})
                    bar.set_postfix({"meta-loss": f"{row['loss']:.4f}", "inner steps/s": f"{rate:,.0f}"}, refresh=False)
                    pending, timed, clock = [], 0, time.perf_counter()
                if saving:
                    if processes.first:
                        result = averaged(state.optimizer, state.phi)
                        if step == end and len(stages) > 1:
                            save_optimizer(run.path / "stages" / name, lopt, result)
                        save_optimizer(run.path / "optimizer", lopt, result)
                    run.save(step, state)
                    clock = time.perf_counter()  # saving does not count
            if step < end:
                break
            phi, begin = jax.device_get(averaged(state.optimizer, state.phi)), end
    if begin < total:
        if processes.first:
            print(
                f"interrupted at meta-step {step} of {total}; continue with --out {run.path} --resume", file=sys.stderr
            )
        return False
    run.mark_complete(total)
    return True


def initial_phi(config: Config, lopt: LearnedOptimizer, key: jax.Array, first: bool = True) -> PyTree:
    """Draw or read the meta-parameters, with the coefficients that the configuration sets.

    Where a checkpoint is going to replace them (not ``first``), the start need not be there any more.
    """
    start = read_start(config, lopt) if first else None
    phi = lopt.init(key) if start is None else start
    for setting in INITIAL_COEFFICIENTS:
        name, value = setting.replace("initial", "log"), getattr(config, setting)
        if value is not None and name in phi:
            phi[name] = jnp.log(jnp.asarray(value, phi[name].dtype))
    return phi


def read_start(config: Config, lopt: LearnedOptimizer) -> PyTree | None:
    """The meta-parameters to start from; None where they are to be drawn.

    Raises:
        UsageError: there is no such optimizer, or its architecture is not ``lopt``'s.
    """
    if config.start is None:
        return None
    try:
        found, phi = load_learned(config.start, lopt.structure)
    except SerializationError as error:
        raise UsageError(f"--start {config.start}: {error}") from None
    names = [f.name for f in dataclasses.fields(lopt) if getattr(found, f.name) != getattr(lopt, f.name)]
    if names:
        listed = "; ".join(f"{name} is {getattr(found, name)!r}, not {getattr(lopt, name)!r}" for name in names)
        raise UsageError(f"--start {config.start} has another architecture ({listed}); ask for that one")
    return phi


def average(metrics: Sequence[Mapping[str, np.ndarray]], truncation: int, windows: int) -> dict[str, Any]:
    """Average the metrics of several meta-steps; the losses also for each window of the horizon (None: not seen)."""
    row: dict[str, Any] = {
        name: float(np.mean([m[name] for m in metrics])) for name in ("loss", "gradient_norm", "gradient_noise")
    }
    which = np.concatenate([m["window_start"] for m in metrics]) // truncation
    losses = np.concatenate([m["window_loss"] for m in metrics])
    row["window_loss"] = [float(losses[which == w].mean()) if (which == w).any() else None for w in range(windows)]
    return row


class StopSignal:
    """Whether SIGINT or SIGTERM has asked to stop. The second signal ends the process in the usual way."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Listen while the context lasts (in the main thread; Python allows it nowhere else)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: Any) -> None:
            self.requested = True
            signal.signal(number, before[signal.Signals(number)])

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def save_optimizer(path: Path, lopt: LearnedOptimizer, phi: PyTree) -> None:
    """Save the meta-parameters as an optimizer that :func:`gmn_lopt.load` reads."""
    try:
        save(path, lopt, phi)
    except SerializationError as error:
        raise RunError(f"{error}; earlier checkpoints are intact, continue with --resume") from None


def to_json(config: Config) -> dict[str, Any]:
    """The configuration as JSON values."""
    values = dataclasses.asdict(config) | {"out": str(config.out)}
    if not config.gmn.attention_heads:  # runs that were begun before there was this setting can be resumed
        del values["gmn"]["attention_heads"]
    return {name: value for name, value in values.items() if name not in SPREAD}


def from_json(settings: Mapping[str, Any]) -> Config:
    """The configuration that :func:`to_json` wrote.

    Raises:
        UsageError: it was written by another version, with other settings.
    """
    try:
        gmn = GradMetaNetConfig(**settings["gmn"])
        return Config(**{**settings, "out": Path(settings["out"]), "gmn": gmn})
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(f"the run's config.json is of another version of this program: {first_line(error)}") from None


def from_command_line(args: Sequence[str]) -> Config:
    """Parse the command line; the defaults are the preset's, with ``--resume`` the settings of the run."""

    def last(flag: str) -> str | None:
        values = [
            a.removeprefix(f"{flag}=") for i, a in enumerate(args) if a.startswith(f"{flag}=") or args[i - 1] == flag
        ]
        return values[-1] if values else None

    preset, out = last("--preset"), last("--out")
    preset = preset if preset in PRESETS else "best"
    default = Config(**{"task": tyro.MISSING, "out": tyro.MISSING, "preset": preset, **PRESETS[preset]})
    if "--resume" in args and "--help" not in args:
        path = Path(out) if out else None
        if path and (path / "config.json").exists():
            default = dataclasses.replace(from_json(read_settings(path)), out=path, resume=True)
    return parse(Config, __doc__, args, default=default)


def use_all_cores() -> None:
    """Make every core of the processor a device of its own, over which the unrolls are spread.

    The operations of small inner problems are too small to be split over threads, so one device keeps one core busy.
    A count given in XLA_FLAGS is respected, and accelerators are not affected.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def cli() -> int:
    """Run from the command line; returns the exit code."""
    use_all_cores()
    try:
        main(from_command_line(sys.argv[1:]))
    except (UsageError, RunError, ProcessesError) as error:
        print(f"meta_train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
