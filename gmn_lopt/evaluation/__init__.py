"""Evaluation: optimizers against tuned baselines, on the same initialisations and the same batches."""

from gmn_lopt.evaluation.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
