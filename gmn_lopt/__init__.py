"""GradMetaNet as a drop-in optax optimizer: learned optimizers that read sets of decomposed gradients."""

from gmn_lopt.factors import analyze, value_grad_and_factors
from gmn_lopt.structure import Factors, GradientStructure, StructureError

__all__ = ["Factors", "GradientStructure", "StructureError", "analyze", "value_grad_and_factors"]
