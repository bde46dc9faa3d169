"""Learned optimizers as optax transformations (arXiv:2507.01649, section 6), composed of parts: one file each."""

from gmn_lopt.optimizers.alias import denoised
from gmn_lopt.optimizers.controlled import Controlled
from gmn_lopt.optimizers.directions import Denoised, Direction, Momentum, Muon
from gmn_lopt.optimizers.explain import explain
from gmn_lopt.optimizers.features import Features, PaperFeatures, ScaleFree
from gmn_lopt.optimizers.horizon import Horizon
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer, LearnedOptimizerState
from gmn_lopt.optimizers.leaves import Gradient
from gmn_lopt.optimizers.multi_steps import MultiStepsState, multi_steps
from gmn_lopt.optimizers.recipes import RECIPES, Recipe, recipe
from gmn_lopt.optimizers.residual import Residual
from gmn_lopt.optimizers.rules import Additive, Normalized, Rule
from gmn_lopt.optimizers.saved import SerializationError, load, save
from gmn_lopt.optimizers.set_reader import SetReader
from gmn_lopt.optimizers.shipped import card, list_pretrained
from gmn_lopt.optimizers.step_size import Constant, Feedback, PowerLaw, StepSize
from gmn_lopt.optimizers.train_state import apply_gradients

__all__ = [
    "RECIPES",
    "Additive",
    "Constant",
    "Controlled",
    "Denoised",
    "Direction",
    "Features",
    "Feedback",
    "Gradient",
    "Horizon",
    "LearnedOptimizer",
    "LearnedOptimizerState",
    "Momentum",
    "MultiStepsState",
    "Muon",
    "Normalized",
    "PaperFeatures",
    "PowerLaw",
    "Recipe",
    "Residual",
    "Rule",
    "ScaleFree",
    "SerializationError",
    "SetReader",
    "StepSize",
    "apply_gradients",
    "card",
    "denoised",
    "explain",
    "list_pretrained",
    "load",
    "multi_steps",
    "recipe",
    "save",
]
