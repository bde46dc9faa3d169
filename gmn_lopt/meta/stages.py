"""Stages of meta-training, one after the other: each has an estimator of its own and its own learning rate."""

import dataclasses
from dataclasses import dataclass

import jax
import optax

from gmn_lopt.meta.coefficients import is_coefficient
from gmn_lopt.meta.estimator import Estimator, InnerProblem
from gmn_lopt.meta.evolution import EvolutionStrategy
from gmn_lopt.meta.meta_step import MetaStep
from gmn_lopt.meta.mixture import MixedMetaStep, MixtureProblem
from gmn_lopt.meta.nres import NRES
from gmn_lopt.meta.pes import PES
from gmn_lopt.meta.sharding import usable_devices
from gmn_lopt.meta.truncated import Truncated
from gmn_lopt.meta.truncated_es import TruncatedES
from gmn_lopt.meta.truncation import OBJECTIVES
from gmn_lopt.util.checks import LONGEST_HORIZON, not_negative, positive, whole
from gmn_lopt.util.codec import from_json, to_json
from gmn_lopt.util.spec import parse_spec

SCHEDULES = ("constant", "cosine")
MOST_META_STEPS = 2**31 - 1  # they are counted in 32 bits
MOST_PAIRS = 2**20


@dataclass(frozen=True)
class Stage:
    """One stage of meta-training. The defaults are the paper's.

    Attributes:
        estimator: a key of :data:`ESTIMATORS`.
        meta_steps: number of meta-steps.
        learning_rate: learning rate of the meta-optimizer, Adam; where it decays, the first.
        schedule: ``"constant"``, or ``"cosine"``: decayed to zero over the stage.
        truncation: inner steps ``K`` in one truncation; must divide the horizon.
        pairs: number of antithetic pairs of the evolution strategies, of single unrolls of ``truncated``.
        sigma: standard deviation of the perturbations of the evolution strategies.
        coefficient_sigma: that of the scalar coefficients (``log_alpha`` and so on); None: ``sigma``.
        coefficient_rate: multiple of the learning rate that the scalar coefficients are learned with; 0 keeps them.
        clip: largest norm of one unroll's gradient in ``truncated``.
        meta_clip: largest global norm of the meta-gradient; it is clipped to it.
        objective: ``"mean"`` of the inner losses along the trajectory, or ``"final"``, the loss at its last step only.
        turns: groups of unrolls that each device takes one after the other, see
            :func:`gmn_lopt.meta.truncation.map_unrolls`; 0: as many as leave one unroll at a time to each core of a
            processor, and one on an accelerator.

    Raises:
        ValueError: in one line, a value that no stage can have.
    """

    estimator: str = "pes"
    meta_steps: int = 50_000
    learning_rate: float | int = 1e-4
    schedule: str = "constant"
    truncation: int = 50
    pairs: int = 16
    sigma: float | int = 0.01
    coefficient_sigma: float | int | None = None
    coefficient_rate: float | int = 1.0
    clip: float | int = 1.0
    meta_clip: float | int = 1.0
    objective: str = "mean"
    turns: int = 0

    def __post_init__(self) -> None:
        for name, known in {"estimator": ESTIMATORS, "schedule": SCHEDULES, "objective": OBJECTIVES}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}")
        positive(self, "learning_rate", "sigma", "clip", "meta_clip")
        whole(self, "meta_steps", most=MOST_META_STEPS)
        whole(self, "truncation", most=LONGEST_HORIZON)
        whole(self, "pairs", most=MOST_PAIRS)
        whole(self, "turns", least=0, most=MOST_PAIRS)
        if self.coefficient_sigma is not None:
            positive(self, "coefficient_sigma")
        not_negative(self, "coefficient_rate")
        if self.turns and self.pairs % self.turns:
            raise ValueError(f"Stage.turns must divide the {self.pairs} pairs, or be 0, not {self.turns}")

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
            ValueError: it cannot be used on it, see :func:`gmn_lopt.meta.truncation.check_truncation`.
        """
        kind = ESTIMATORS[self.estimator]
        if issubclass(kind, Truncated):
            return Truncated(problem, self.pairs, self.truncation, self.clip, self.objective, turns=self.groups)
        own = (self.sigma, self.objective, self.coefficient_sigma, self.groups)
        return kind(problem, self.pairs, self.truncation, *own)

    def meta_step(self, problem: InnerProblem | MixtureProblem) -> MetaStep | MixedMetaStep:
        """The stage's meta-step on ``problem``; raises as :meth:`build` does."""
        optimizer = self.meta_optimizer()
        if isinstance(problem, MixtureProblem):
            parts = zip(problem.problems, problem.weights, strict=True)
            return MixedMetaStep(tuple(MetaStep(self.build(part), optimizer, weight) for part, weight in parts))
        return MetaStep(self.build(problem), optimizer)

    def meta_optimizer(self) -> optax.GradientTransformation:
        """Adam, after clipping the meta-gradient to a global norm."""
        rate, cosine = self.learning_rate, self.schedule == "cosine"
        parts = [
            optax.clip_by_global_norm(self.meta_clip),
            optax.adam(optax.cosine_decay_schedule(rate, self.meta_steps) if cosine else rate),
        ]
        if self.coefficient_rate != 1:
            parts.append(optax.masked(optax.scale(self.coefficient_rate), is_coefficient))
        return optax.chain(*parts)


ESTIMATORS: dict[str, type[EvolutionStrategy | Truncated]] = {
    "pes": PES,
    "nres": NRES,
    "es": TruncatedES,
    "truncated": Truncated,
}
"""Persistent, noise-reuse and truncated evolution strategies; truncated back-propagation."""


def parse_stage(text: str, default: Stage | None = None) -> Stage:
    """Parse a stage, such as ``truncated:meta_steps=300,learning_rate=3e-3,truncation=25``.

    Args:
        text: the estimator, and settings that are fields of :class:`Stage`.
        default: what the text does not say is taken from it; default: :class:`Stage`'s own values.

    Raises:
        ValueError: in one line, text that is no stage.

    Example:
        >>> stage = parse_stage("nres:meta_steps=400,learning_rate=3e-3")
        >>> stage.estimator, stage.meta_steps, stage.pairs
        ('nres', 400, 16)
    """
    try:
        estimator, settings = parse_spec(text)
        known = [field.name for field in dataclasses.fields(Stage)][1:]
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(f"cannot use {', '.join(unknown)}; the settings of a stage are {', '.join(known)}")
        stage: Stage = from_json(to_json(default or Stage()) | settings | {"estimator": estimator}, Stage, "stage")
        return stage
    except ValueError as error:
        raise ValueError(f"stage {text!r}: {error}") from None
