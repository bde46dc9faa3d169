"""Networks on sets of gradients and on weights (arXiv:2507.01649, section 5), which know no optimizers.

The steps of GradMetaNet are listed in :mod:`gmn_lopt.networks.gradmetanet`. The networks that turn features of
parameter entries into updates are :class:`PointwiseMLP` (the paper's ``DS``) and :class:`UNF`.
"""

from gmn_lopt.networks.gradmetanet import GradMetaNet, GradMetaNetConfig, init_gradmetanet
from gmn_lopt.networks.gradmetanet_pp import GradMetaNetPlusPlus, GradMetaNetPlusPlusConfig
from gmn_lopt.networks.invariant import InvariantGradMetaNet
from gmn_lopt.networks.pointwise import PointwiseMLP
from gmn_lopt.networks.unf import UNF, EquivariantLinear

__all__ = [
    "UNF",
    "EquivariantLinear",
    "GradMetaNet",
    "GradMetaNetConfig",
    "GradMetaNetPlusPlus",
    "GradMetaNetPlusPlusConfig",
    "InvariantGradMetaNet",
    "PointwiseMLP",
    "init_gradmetanet",
]
