"""The configuration of a meta-training run, and how it is written and read."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gmn_lopt.meta.stages import MOST_META_STEPS, Stage
from gmn_lopt.optimizers.recipes import Recipe
from gmn_lopt.util import codec
from gmn_lopt.util.checks import LONGEST_HORIZON, path, positive, whole
from gmn_lopt.util.errors import UsageError
from gmn_lopt.util.spec import parse_spec


@dataclass(frozen=True)
class Config:
    """Settings of a run. Those that the result depends on are fixed once it has begun."""

    task: str
    """A task by name, or one of your own as package.module:make; each may be followed by settings, as in
    cifar10_mlp:hidden=64. Or mixture: several tasks, with step sizes, schedules and the scale of every tensor drawn at
    random (for an optimizer of the normalized rule)."""
    out: Path
    """Directory of the run."""
    optimizer: Recipe = field(default_factory=Recipe)
    """What to train."""
    stages: Annotated[tuple[Stage, ...], tyro.conf.Suppress] = (Stage(),)  # --stage replaces them all
    """Stages of meta-training, one after the other."""
    data_dir: str | None = None
    """Directory of data sets (TensorFlow Datasets' layout); default: its own."""
    resume: bool = False
    """Continue the run in --out, with its settings; nothing else has to be given again but a task of your own, so that
    no file can name the code that is executed."""
    seed: int = 0
    """Seed of all randomness."""
    start: str | None = None
    """Saved or shipped optimizer to train further: its recipe and its meta-parameters."""
    meta_loss: Literal["train", "validation"] = "train"
    """Batch that the meta-objective is taken on: the one trained on, or one of the split that is never trained on."""
    rate_range: float = 3.0
    """In the mixture: steps are multiplied by a random factor, up to this either way, in each inner problem."""
    horizon: int | None = None
    """Inner steps T of one inner problem; default: the task's."""

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

    def __post_init__(self) -> None:
        whole(self, "log_every", "checkpoint_every", "keep", "keep_every", most=10**9)
        whole(self, "seed", least=0, most=2**32 - 1)
        positive(self, "rate_range")
        if self.horizon is not None:
            whole(self, "horizon", most=LONGEST_HORIZON)
        for name in ("processes", "process_id"):
            if getattr(self, name) is not None:
                whole(self, name, least=0, most=10**6)
        path(self, "out", "data_dir", "start")
        if not self.stages:
            raise ValueError("a run needs at least one stage")
        total = sum(stage.meta_steps for stage in self.stages)
        if total > MOST_META_STEPS:
            raise ValueError(f"the stages have {total} meta-steps together, more than {MOST_META_STEPS}")


# How the run is spread is asked for each time; a resumed run need not be spread like before.
SPREAD = ("coordinator", "processes", "process_id")
# What a run may be resumed with other values of: none of it changes the meta-parameters that result.
FREE = ("out", "data_dir", "resume", "log_every", "checkpoint_every", "keep", "keep_every")


def names_a_module(task: str) -> bool:
    """Whether a task is made by code that its text names, and not by this package's: to load it is to execute that.

    Example:
        >>> names_a_module("digits_mlp:hidden=8"), names_a_module("os:system")
        (False, True)
    """
    return ":" in parse_spec(task)[0]


def resuming(config: Config) -> str:
    """The flags that continue a run."""
    task = f" --task {shlex.quote(config.task)}" if names_a_module(config.task) else ""
    return f"--out {config.out} --resume{task}"


def to_json(config: Config) -> dict[str, Any]:
    """The configuration as JSON values, without how it is spread over processes."""
    return {name: value for name, value in codec.to_json(config).items() if name not in SPREAD}


def from_json(settings: Mapping[str, Any], file: str | Path = "the run's config.json") -> Config:
    """The configuration that :func:`to_json` wrote, from a file of this name.

    Raises:
        UsageError: it is damaged, or was written by another version, with other settings.
    """
    try:
        config: Config = codec.from_json({**settings, **dict.fromkeys(SPREAD)}, Config, "settings")
        return config
    except ValueError as error:
        raise UsageError(f"{file} is damaged, or of another version of this program: {error}") from None
