"""GradMetaNet as a drop-in optax optimizer: learned optimizers that read sets of decomposed gradients."""

from gmn_lopt.factors import analyze, value_grad_and_factors
from gmn_lopt.gradmetanet import GradMetaNet, GradMetaNetConfig, InvariantGradMetaNet
from gmn_lopt.learned_optimizer import LearnedOptimizer, LearnedOptimizerState
from gmn_lopt.serialization import SerializationError, load, save
from gmn_lopt.shipped import card, list_pretrained
from gmn_lopt.structure import Factors, GradientStructure, Layer, Parameter, Site, SiteRef, Space, StructureError

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
