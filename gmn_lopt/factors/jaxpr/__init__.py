"""Analysis of a loss's jaxpr: finds the linear layers, neuron spaces, sites and parameters of any JAX model.

README.md in this folder explains it.
"""
