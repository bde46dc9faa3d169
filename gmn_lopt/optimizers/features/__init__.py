"""What a per-parameter network reads: one file each set of features."""

from gmn_lopt.optimizers.features.base import Features
from gmn_lopt.optimizers.features.paper import DECAYS, PaperFeatures
from gmn_lopt.optimizers.features.scale_free import ScaleFree

__all__ = ["DECAYS", "Features", "PaperFeatures", "ScaleFree"]
