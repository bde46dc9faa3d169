"""The baselines of the fair protocol: each a constructor, and what of it is tuned."""

import optax

from gmn_lopt.evaluation.baselines.base import Axis, Baseline, Scalar, decays, rates, scheduled
from gmn_lopt.evaluation.baselines.kron import kron
from gmn_lopt.evaluation.baselines.muon import muon
from gmn_lopt.evaluation.baselines.soap import soap

__all__ = ["BASELINES", "Axis", "Baseline", "adamw", "kron", "muon", "nadamw", "scheduled", "soap"]


def adamw(total_steps: int, learning_rate: Scalar, weight_decay: Scalar) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), with optax's defaults and a schedule."""
    return optax.adamw(scheduled(learning_rate, total_steps), weight_decay=weight_decay)


def nadamw(total_steps: int, learning_rate: Scalar, weight_decay: Scalar) -> optax.GradientTransformation:
    """AdamW with Nesterov's momentum (Dozat, 2016), with optax's defaults and a schedule."""
    return optax.nadamw(scheduled(learning_rate, total_steps), weight_decay=weight_decay)


BASELINES = (
    Baseline("adamw", adamw, (rates(4e-3), decays())),
    Baseline("nadamw", nadamw, (rates(4e-3), decays())),
    Baseline("muon", muon, (rates(0.04), decays(), rates(4e-3, "adam_learning_rate"))),
    Baseline("soap", soap, (rates(4e-3), decays())),
    Baseline("kron", kron, (rates(4e-3), decays())),
)
"""All of them. One more is one more entry."""
