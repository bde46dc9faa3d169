"""What a gradient is made of: its rank-1 factors, and the structure of the model (arXiv:2507.01649, section 3)."""

from gmn_lopt.factors.kinds import KINDS, Conv, Dense, Embedding, LayerKind
from gmn_lopt.factors.parallel import gather_factors
from gmn_lopt.factors.spaces import Parameter, Site, SiteRef, Space, StructureError
from gmn_lopt.factors.structure import Factors, GradientStructure, Layer
from gmn_lopt.factors.value_and_grad import (
    analyze,
    factors_and_remainder,
    value_grad_and_extra,
    value_grad_and_factors,
)

__all__ = [
    "KINDS",
    "Conv",
    "Dense",
    "Embedding",
    "Factors",
    "GradientStructure",
    "Layer",
    "LayerKind",
    "Parameter",
    "Site",
    "SiteRef",
    "Space",
    "StructureError",
    "analyze",
    "factors_and_remainder",
    "gather_factors",
    "value_grad_and_extra",
    "value_grad_and_factors",
]
