"""Networks on sets of gradients and on weights (arXiv:2507.01649, section 5), which know no optimizers.

The steps of GradMetaNet are listed in :mod:`gmn_lopt.networks.gradmetanet`. The networks that turn features of
parameter entries into updates are :class:`PointwiseMLP` (the paper's ``DS``) and :class:`UNF`. Those that read the
weights of another network are :class:`DeepWeightSpace` and :class:`GraphNetwork`; an :class:`Editor` changes them.
"""

from gmn_lopt.networks.deep_weight_space import DeepWeightSpace
from gmn_lopt.networks.editor import Editor, shown
from gmn_lopt.networks.gradmetanet import GradMetaNet, GradMetaNetConfig, init_gradmetanet
from gmn_lopt.networks.gradmetanet_pp import GradMetaNetPlusPlus, GradMetaNetPlusPlusConfig
from gmn_lopt.networks.graph import GraphNetwork
from gmn_lopt.networks.invariant import InvariantGradMetaNet
from gmn_lopt.networks.pointwise import PointwiseMLP
from gmn_lopt.networks.saved_editor import EditorError, LoadedEditor, load_editor, save_editor
from gmn_lopt.networks.unf import UNF, EquivariantLinear

__all__ = [
    "UNF",
    "DeepWeightSpace",
    "Editor",
    "EditorError",
    "EquivariantLinear",
    "GradMetaNet",
    "GradMetaNetConfig",
    "GradMetaNetPlusPlus",
    "GradMetaNetPlusPlusConfig",
    "GraphNetwork",
    "InvariantGradMetaNet",
    "LoadedEditor",
    "PointwiseMLP",
    "init_gradmetanet",
    "load_editor",
    "save_editor",
    "shown",
]
