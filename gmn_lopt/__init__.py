"""GradMetaNet as a drop-in optax optimizer: learned optimizers that read sets of decomposed gradients."""

from gmn_lopt.factors.structure import (
    Factors,
    GradientStructure,
    Layer,
    Parameter,
    Site,
    SiteRef,
    Space,
    StructureError,
)
from gmn_lopt.factors.value_and_grad import analyze, value_grad_and_factors
from gmn_lopt.networks.gradmetanet import GradMetaNet, GradMetaNetConfig, InvariantGradMetaNet
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer, LearnedOptimizerState
from gmn_lopt.optimizers.saved import SerializationError, load, save
from gmn_lopt.optimizers.shipped import card, list_pretrained

__all__ = [
    "Factors",
    "GradMetaNet",
    "GradMetaNetConfig",
    "GradientStructure",
    "InvariantGradMetaNet",
    "Layer",
    "LearnedOptimizer",
    "LearnedOptimizerState",
    "Parameter",
    "SerializationError",
    "Site",
    "SiteRef",
    "Space",
    "StructureError",
    "analyze",
    "card",
    "list_pretrained",
    "load",
    "save",
    "value_grad_and_factors",
]
