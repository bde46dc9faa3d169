"""The configuration of a meta-training run: its settings, the presets, and how it is written and read."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from gmn_lopt.cli.command_line import parse
from gmn_lopt.meta.run_directory import read_settings
from gmn_lopt.meta.stages import Stage, parse_stages
from gmn_lopt.networks.gradmetanet import GradMetaNetConfig
from gmn_lopt.optimizers.saved import ADDED, gradmetanet_from_json
from gmn_lopt.util.errors import first_line

BACKBONES = ("ds", "unf", "celo")
OPTIMIZERS = ("sgdm", *(f"{backbone}{rest}" for backbone in BACKBONES for rest in ("", "+gmn", "+gmn++")))


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
    coefficients), ema (decay of an average of the meta-parameters, which is then what the stage saves and hands on),
    imitation (weight of the distance from an expert's updates, added to the loss) and expert (a base direction such as
    adam/0.004)."""
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
    rate_range: float = 3.0
    """In the mixture: steps are multiplied by a random factor, up to this either way, in each inner problem."""
    horizon: int | None = None
    """Inner steps T of one inner problem; default: the task's."""

    base: Literal["momentum", "adam", "muon", "denoised"] = "momentum"
    """Direction that the learned part is added to."""
    rule: Literal["additive", "normalized"] = "additive"
    """How direction and learned part make a step; normalized: of a size that only the learning rate sets."""
    orthogonalize: bool = False
    """Whether the normalized rule orthogonalises the steps of kernels, as Muon does."""
    gate: bool = False
    """Whether the network also scales the step, entry by entry: a learned schedule."""
    decay: bool = False
    """Whether alpha falls as alpha (1 + step / tau)^-power, with learned tau and power; in the normalized
    rule, whether the learning rate does so where the user gives none."""
    adapt: bool = False
    """Whether the same step size is adapted while training, by whether gradients agree with the steps before them."""
    bound: float | None = None
    """Largest size of the learned part relative to the direction, in the additive rule; default: none."""
    learning_rate: float = 1e-3
    """Learning rate of the normalized rule."""
    output_scale: float = 1.0
    """What the last layer of the per-parameter network is multiplied by at the start; 0: the direction by itself."""
    initial_alpha: float | None = None
    """What alpha, the learning rate of the whole update, starts at; default: by base, 0.1, 0.001, 0.03 or 0.02."""
    initial_beta: float | None = None
    """What beta, the weight of the network's part, starts at; default: by base, 0.001, 0.1 or 0.01; normalized, 0.1."""
    initial_tau: float | None = None
    """What tau, in steps, starts at; default: 30."""
    initial_power: float | None = None
    """What power starts at; default: 1."""
    initial_gain: float | None = None
    """What gain, how fast the step size is adapted, starts at; default: 0.02."""
    initial_overshoot: float | None = None
    """What overshoot, how far steps go beyond those that make the most of the next one, starts at; default: 0.02."""
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


INITIAL_COEFFICIENTS = tuple(f.name for f in dataclasses.fields(Config) if f.name.startswith("initial_"))
# How the run is spread is asked for each time; a resumed run need not be spread like before.
SPREAD = ("coordinator", "processes", "process_id")
# What a run may be resumed with other values of: none of it changes the meta-parameters that result.
FREE = ("out", "data_dir", "resume", "log_every", "checkpoint_every", "keep", "keep_every")


PRESETS: dict[str, dict[str, Any]] = {
    "best": {
        "base": "denoised",
        "decay": True,
        "width": 8,
        "hidden_layers": 2,
        "output_scale": 0.0,
        "initial_alpha": 0.045,
        "initial_beta": 0.01,
        "initial_tau": 50.0,
        "initial_power": 0.8,
        "gmn": GradMetaNetConfig(width=16, set_layers=1, product_width=16, max_set_size=32),
        "stages": "truncated:40:3e-3:K=100:n=4:schedule=cosine:clip=0.1:coefficient_rate=0",
        "checkpoint_every": 10,
    },
    "paper": {},
}
"""What each preset changes of ``Config``."""


class UsageError(ValueError):
    """The configuration asks for something that cannot be done. The message is one line."""


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


def to_json(config: Config) -> dict[str, Any]:
    """The configuration as JSON values."""
    values = dataclasses.asdict(config) | {"out": str(config.out)}
    for name, value in ADDED["gradmetanet"].items():  # runs that were begun before there was a setting can be resumed
        if values["gmn"][name] == value:
            del values["gmn"][name]
    values = {name: value for name, value in values.items() if name not in SPREAD}
    return json.loads(json.dumps(values))  # tuples become lists, as they are in the file


def from_json(settings: Mapping[str, Any]) -> Config:
    """The configuration that :func:`to_json` wrote.

    Raises:
        UsageError: it was written by another version, with other settings.
    """
    try:
        gmn = gradmetanet_from_json(settings["gmn"])
        return Config(**{**settings, "out": Path(settings["out"]), "gmn": gmn})
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(f"the run's config.json is of another version of this program: {first_line(error)}") from None


def from_command_line(description: str | None, args: Sequence[str]) -> Config:
    """Parse the command line; the defaults are the preset's, with ``--resume`` the settings of the run.

    Args:
        description: what ``--help`` says first.
        args: the command line, without the program's name.
    """

    def last(flag: str) -> str | None:
        values = [
            a.removeprefix(f"{flag}=") for i, a in enumerate(args) if a.startswith(f"{flag}=") or args[i - 1] == flag
        ]
        return values[-1] if values else None

    preset, out = last("--preset"), last("--out")
    preset = preset if preset in PRESETS else "best"
    default = Config(**{"task": "", "out": Path(), "preset": preset, **PRESETS[preset]})
    for name in ("task", "out"):  # no value of their types says that a flag has to be given
        object.__setattr__(default, name, tyro.MISSING)
    if "--resume" in args and "--help" not in args:
        path = Path(out) if out else None
        if path and (path / "config.json").exists():
            default = dataclasses.replace(from_json(read_settings(path)), out=path, resume=True)
    return parse(Config, description, args, default=default)
