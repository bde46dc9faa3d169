"""Analysis of a loss's jaxpr: finds the linear layers, neuron spaces, sites and parameters of any JAX model."""

from gmn_lopt.factors.jaxpr.assemble import Tap, Traced, assemble
from gmn_lopt.factors.jaxpr.program import Path

__all__ = ["Path", "Tap", "Traced", "assemble"]
