"""Stages of meta-training: a sequence of estimators, each with its own meta-steps and meta-learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import optax

from gmn_lopt.meta.estimator import Estimator
from gmn_lopt.meta.pes import PES
from gmn_lopt.meta.problem import InnerProblem
from gmn_lopt.meta.truncated import Truncated
from gmn_lopt.meta.window import OBJECTIVES

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Stage:
    """One stage of meta-training.

    Attributes:
        estimator: a key of :data:`ESTIMATORS`.
        meta_steps: number of meta-steps.
        learning_rate: learning rate of the meta-optimizer, Adam; where it decays, that of the first meta-step.
        schedule: ``"constant"``, or ``"cosine"``: decayed to zero over the stage.
        truncation: inner steps ``K`` in one window.
        pairs: number of antithetic pairs of PES, of single unrolls of ``truncated``.
        sigma: standard deviation of the perturbations of PES.
        clip: largest norm of one unroll's gradient in ``truncated``.
        objective: ``"mean"`` or ``"final"``.
        order: 2 or 1, of the derivatives in ``truncated``; see :class:`gmn_lopt.meta.training_problem.TrainingProblem`.
        turns: groups of unrolls that each device takes one after the other; see
            :func:`gmn_lopt.meta.window.map_unrolls`.

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
    order: int = 2
    turns: int = 1

    def __post_init__(self) -> None:
        for name, known in (("estimator", ESTIMATORS), ("schedule", SCHEDULES), ("objective", OBJECTIVES)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}")
        for name in ("meta_steps", "learning_rate", "truncation", "pairs", "sigma", "clip", "turns"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be positive")

    def build(self, problem: InnerProblem) -> Estimator:
        """The stage's estimator of the meta-gradient of ``problem``."""
        if self.order != 2:
            problem = replace(problem, order=self.order)
        return ESTIMATORS[self.estimator](self, problem)

    def meta_optimizer(self, clip_norm: float | int) -> optax.GradientTransformation:
        """Adam, after clipping the meta-gradient to a global norm."""
        rate: Any = self.learning_rate
        if self.schedule == "cosine":
            rate = optax.cosine_decay_schedule(rate, self.meta_steps)
        return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adam(rate))


ESTIMATORS: dict[str, Callable[[Stage, InnerProblem], Any]] = {
    "pes": lambda s, problem: PES(problem, s.pairs, s.truncation, s.sigma, s.objective, turns=s.turns),
    "truncated": lambda s, problem: Truncated(problem, s.pairs, s.truncation, s.clip, s.objective, turns=s.turns),
}

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
