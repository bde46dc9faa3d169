"""Muon, of optax, for all matrices and convolutions."""

import jax
import optax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers

from gmn_lopt.evaluation.baselines.base import Scalar, scheduled


def muon(
    total_steps: int, learning_rate: Scalar, weight_decay: Scalar, adam_learning_rate: Scalar
) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024), as optax has it, and AdamW with a rate of its own for vectors and scalars.

    Kernels of convolutions are matrices ``[all other axes, outputs]``. Embeddings and output layers have Muon's step,
    too: a shape does not tell them.
    """
    return optax.contrib.muon(
        scheduled(learning_rate, total_steps),
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        adam_learning_rate=scheduled(adam_learning_rate, total_steps),
        muon_weight_dimension_numbers=_matrices,
    )


def _matrices(params: PyTree) -> PyTree:
    """How each parameter is a matrix; None where it is none."""
    return jax.tree.map(
        lambda x: MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1) if x.ndim > 1 else None, params
    )
