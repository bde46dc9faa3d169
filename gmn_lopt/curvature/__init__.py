"""Curvature of a loss from rank-1 factors: the empirical Fisher matrix (arXiv:2507.01649, section 7.1)."""

from gmn_lopt.curvature.fisher import fisher_diagonal, fisher_trace
from gmn_lopt.curvature.predictor import FisherPredictor, load_predictor, save_predictor, standard_estimate
from gmn_lopt.curvature.products import empirical_fisher_vector_product
from gmn_lopt.curvature.standardization import fit_standardization, standardize

__all__ = [
    "FisherPredictor",
    "empirical_fisher_vector_product",
    "fisher_diagonal",
    "fisher_trace",
    "fit_standardization",
    "load_predictor",
    "save_predictor",
    "standard_estimate",
    "standardize",
]
