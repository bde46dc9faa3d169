"""Analysis of a loss's jaxpr: finds the linear layers, neuron spaces, sites and parameters of any JAX model."""

from gmn_lopt.analysis.assemble import Tap, Traced, assemble
from gmn_lopt.analysis.program import Path

__all__ = ["Path", "Tap", "Traced", "assemble"]
