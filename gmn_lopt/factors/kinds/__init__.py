"""The kinds of linear layer. To add one: a file here with a :class:`LayerKind`, and its name in ``KINDS``."""

from gmn_lopt.factors.kinds.base import Arrangement, KernelDims, LayerKind, Matrices
from gmn_lopt.factors.kinds.conv import Conv
from gmn_lopt.factors.kinds.dense import Dense
from gmn_lopt.factors.kinds.embedding import Embedding

KINDS: tuple[type[LayerKind], ...] = (Embedding, Dense, Conv)

__all__ = ["KINDS", "Arrangement", "Conv", "Dense", "Embedding", "KernelDims", "LayerKind", "Matrices"]
