"""Meta-training: estimators of the meta-gradient, the problems they unroll, and runs."""

from gmn_lopt.meta.estimator import Estimate, Estimator, InnerProblem
from gmn_lopt.meta.nres import NRES
from gmn_lopt.meta.pes import PES
from gmn_lopt.meta.task import Task
from gmn_lopt.meta.training_problem import TrainingProblem
from gmn_lopt.meta.truncated import Truncated
from gmn_lopt.meta.truncated_es import TruncatedES

__all__ = [
    "NRES",
    "PES",
    "Estimate",
    "Estimator",
    "InnerProblem",
    "Task",
    "TrainingProblem",
    "Truncated",
    "TruncatedES",
]
