"""The directions that the learned part of an update is added to: one file each."""

from gmn_lopt.optimizers.directions.base import Direction
from gmn_lopt.optimizers.directions.denoised import Denoised
from gmn_lopt.optimizers.directions.momentum import Momentum
from gmn_lopt.optimizers.directions.muon import Muon

__all__ = ["Denoised", "Direction", "Momentum", "Muon"]
