"""Stages of meta-training: a sequence of estimators, each with its own meta-steps and meta-learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import optax

from gmn_lopt.meta.averaging import average_of_parameters
from gmn_lopt.meta.coefficients import is_coefficient, is_weight
from gmn_lopt.meta.estimator import Estimator
from gmn_lopt.meta.imitation import ImitationProblem
from gmn_lopt.meta.meta_step import MetaStep
from gmn_lopt.meta.mixture import MixedMetaStep, MixtureProblem, Weighted
from gmn_lopt.meta.pes import PES
from gmn_lopt.meta.problem import InnerProblem
from gmn_lopt.meta.shaping import SHAPINGS
from gmn_lopt.meta.sharding import usable_devices
from gmn_lopt.meta.training_problem import TrainingProblem
from gmn_lopt.meta.truncated import Truncated
from gmn_lopt.meta.window import OBJECTIVES

SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class Stage:
    """One stage of meta-training.

    Attributes:
        estimator: a key of :data:`ESTIMATORS`.
        meta_steps: number of meta-steps.
        learning_rate: learning rate of the meta-optimizer, Adam; where it decays or is warmed up, the largest.
        schedule: ``"constant"``, or ``"cosine"`` or ``"linear"``: decayed to zero over the stage.
        truncation: inner steps ``K`` in one window.
        pairs: number of antithetic pairs of the evolution strategies, of single unrolls of ``truncated``.
        sigma: standard deviation of the perturbations of the evolution strategies.
        clip: largest norm of one unroll's gradient in ``truncated``.
        objective: ``"mean"`` or ``"final"``.
        turns: groups of unrolls that each device takes one after the other, see
            :func:`gmn_lopt.meta.window.map_unrolls`; 0: as many as leave one unroll at a time to each core of a
            processor, and one on an accelerator.
        coefficient_sigma: ``sigma`` of the scalar coefficients (``log_alpha`` and so on); 0: the same.
        shaping: of the loss differences of the evolution strategies, see
            :func:`gmn_lopt.meta.shaping.shape_differences`.
        warmup: meta-steps over which the learning rate rises linearly, before its schedule begins.
        weight_decay: decoupled weight decay (AdamW): this times the learning rate of every weight is taken off it at
            each meta-step; scalar coefficients are left alone. 0: none, which is Adam.
        coefficient_rate: multiple of the learning rate that the scalar coefficients are learned with; 0 keeps them.
        ema: decay, per meta-step, of the moving average of the meta-parameters that is the stage's result
            (:func:`gmn_lopt.meta.averaging.averaged`); 0: the meta-parameters of the last meta-step are.
        imitation: weight of the distance from an expert's updates that is added to the loss
            (:class:`gmn_lopt.meta.imitation.ImitationProblem`); 0: none. Stages of falling weight fade it out.
        expert: the base direction that is imitated, with slashes for colons.

    Raises:
        ValueError: in one line, a value that no stage can have.
    """

    estimator: str = "pes"
    meta_steps: int = 50_000
    learning_rate: float = 1e-4
    schedule: str = "constant"
    truncation: int = 50
    pairs: int = 16
    sigma: float = 0.01
    clip: float = 1.0
    objective: str = "mean"
    turns: int = 0
    coefficient_sigma: float = 0.0
    shaping: str = "none"
    warmup: int = 0
    weight_decay: float = 0.0
    coefficient_rate: float = 1.0
    ema: float = 0.0
    imitation: float = 0.0
    expert: str = "denoised/0.045/50/0.8"

    def __post_init__(self) -> None:
        names = {"estimator": ESTIMATORS, "schedule": SCHEDULES, "objective": OBJECTIVES, "shaping": SHAPINGS}
        for name, known in names.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}")
        for name in ("meta_steps", "learning_rate", "truncation", "pairs", "sigma", "clip"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be positive")
        for name in ("coefficient_sigma", "warmup", "weight_decay", "coefficient_rate", "imitation"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must not be negative")
        if self.warmup >= self.meta_steps:
            raise ValueError(f"warmup is {self.warmup}; it must be less than the {self.meta_steps} meta-steps")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it must be at least 0 and less than 1")
        if self.turns < 0 or (self.turns and self.pairs % self.turns):
            raise ValueError(f"turns is {self.turns}; it must divide the {self.pairs} pairs, or be 0")

    @property
    def groups(self) -> int:
        """The groups of unrolls that are taken one after the other."""
        if self.turns:
            return self.turns
        devices = usable_devices(self.pairs, jax.device_count())
        return self.pairs // devices if jax.default_backend() == "cpu" else 1

    def build(self, problem: InnerProblem) -> Estimator:
        """The stage's estimator of the meta-gradient of ``problem``.

        Raises:
            ValueError: the estimator cannot be used on it, see :func:`gmn_lopt.meta.window.check_window`, or the
                expert cannot be imitated.
        """
        if self.imitation:
            if not isinstance(problem, TrainingProblem):
                raise ValueError("imitation needs a training problem without augmentation")
            problem = ImitationProblem(problem, self.expert, self.imitation)
        estimator: Estimator = ESTIMATORS[self.estimator](self, problem)
        return estimator

    def meta_step(self, problem: InnerProblem | MixtureProblem, clip_norm: float | int) -> MetaStep | MixedMetaStep:
        """The stage's meta-step on ``problem``, with the meta-gradient clipped to a global norm.

        Raises:
            ValueError: see :meth:`build`.
        """
        optimizer = self.meta_optimizer(clip_norm)
        if isinstance(problem, MixtureProblem):
            parts = [Weighted(self.build(part), w) for part, w in zip(problem.problems, problem.weights, strict=True)]
            return MixedMetaStep(tuple(MetaStep(part, optimizer) for part in parts))
        return MetaStep(self.build(problem), optimizer)

    def meta_optimizer(self, clip_norm: float | int) -> optax.GradientTransformation:
        """Adam or AdamW, after clipping the meta-gradient to a global norm; it keeps the average if there is one."""
        rate = self._rate()
        decay = self.weight_decay
        parts = [
            optax.clip_by_global_norm(clip_norm),
            optax.adamw(rate, weight_decay=decay, mask=is_weight) if decay else optax.adam(rate),
        ]
        if self.coefficient_rate != 1:
            parts.append(optax.masked(optax.scale(self.coefficient_rate), is_coefficient))
        if self.ema:
            parts.append(average_of_parameters(self.ema))
        return optax.chain(*parts)

    def _rate(self) -> Any:
        """The learning rate: a number, or a function of the number of the meta-step."""
        rate, steps = self.learning_rate, self.meta_steps - self.warmup
        decayed: Any = {
            "constant": rate if not self.warmup else optax.constant_schedule(rate),
            "cosine": optax.cosine_decay_schedule(rate, steps),
            "linear": optax.linear_schedule(rate, 0.0, steps),
        }[self.schedule]
        if not self.warmup:
            return decayed
        rising = optax.linear_schedule(rate / (self.warmup + 1), rate, self.warmup)
        return optax.join_schedules([rising, decayed], [self.warmup])


def _evolution(noise: str) -> Callable[[Stage, InnerProblem], PES]:
    def build(s: Stage, problem: InnerProblem) -> PES:
        return PES(
            *(problem, s.pairs, s.truncation, s.sigma, s.objective, noise, s.coefficient_sigma, s.shaping, s.groups)
        )

    return build


ESTIMATORS: dict[str, Callable[[Stage, InnerProblem], Any]] = {
    "pes": _evolution("persistent"),
    "nres": _evolution("reused"),
    "es": _evolution("truncated"),
    "truncated": lambda s, problem: Truncated(problem, s.pairs, s.truncation, s.clip, s.objective, turns=s.groups),
}
"""Persistent, noise-reuse and truncated evolution strategies; truncated back-propagation."""

SHORT_NAMES = {"K": "truncation", "n": "pairs"}


def parse_stages(text: str, default: Stage) -> tuple[Stage, ...]:
    """Parse a sequence of stages, such as ``truncated:300:3e-3:K=25:n=8,pes``.

    Stages are separated by commas. A stage is ``ESTIMATOR[:META_STEPS[:LEARNING_RATE]][:SETTING=VALUE...]``; a setting
    is a field of :class:`Stage`, or ``K`` (truncation) or ``n`` (pairs).

    Args:
        text: the sequence.
        default: what a stage does not say is taken from it.

    Raises:
        ValueError: in one line, text that is no sequence of stages.
    """
    return tuple(_parse_stage(part.strip(), default) for part in text.split(","))


def _parse_stage(text: str, default: Stage) -> Stage:
    estimator, *rest = text.split(":")
    values: dict[str, str] = {"estimator": estimator}
    for position, item in enumerate(rest):
        name, equals, value = item.partition("=")
        if not equals and position < 2:
            name, value = ("meta_steps", "learning_rate")[position], item
        name = SHORT_NAMES.get(name, name)
        if name in values or name not in (f.name for f in fields(Stage)):
            settings = [*SHORT_NAMES, *[f.name for f in fields(Stage)][1:]]
            raise ValueError(
                f"stage {text!r}: cannot use {item!r}; write ESTIMATOR:META_STEPS:LEARNING_RATE:SETTING=VALUE, each "
                f"setting once, with the settings {', '.join(settings)}"
            )
        values[name] = value
    try:
        types = {f.name: type(getattr(default, f.name)) for f in fields(Stage)}
        return replace(default, **{name: types[name](value) for name, value in values.items()})
    except ValueError as error:
        raise ValueError(f"stage {text!r}: {error}") from None
