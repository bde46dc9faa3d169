"""Named compositions: the paper's learned optimizers to the letter, and those that the shipped ones were trained from.

To make one of your own, copy one of these: a recipe is an optimizer without a model's structure.
"""

from dataclasses import dataclass, field, replace

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.networks.gradmetanet import GradMetaNetConfig
from gmn_lopt.networks.gradmetanet_pp import GradMetaNetPlusPlusConfig
from gmn_lopt.networks.pointwise import PointwiseMLP
from gmn_lopt.networks.unf import UNF
from gmn_lopt.optimizers.controlled import Controlled
from gmn_lopt.optimizers.directions import Denoised, Direction, Momentum
from gmn_lopt.optimizers.features import ScaleFree
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.optimizers.residual import Residual
from gmn_lopt.optimizers.rules import Additive, Normalized, Rule
from gmn_lopt.optimizers.set_reader import SetReader
from gmn_lopt.optimizers.step_size import Constant, Feedback, PowerLaw, StepSize


@dataclass(frozen=True)
class Recipe:
    """The parts of a :class:`LearnedOptimizer`, which see; all but its structure.

    Example:
        >>> Recipe(step_size=Constant(0.5)).direction
        Momentum(decay=0.9)
    """

    direction: Direction = field(default_factory=Momentum)
    residual: Residual | None = None
    rule: Rule = field(default_factory=Additive)
    step_size: StepSize = field(default_factory=Constant)

    @classmethod
    def of(cls, lopt: LearnedOptimizer) -> "Recipe":
        """The recipe of a learned optimizer."""
        return cls(lopt.direction, lopt.residual, lopt.rule, lopt.step_size)

    def build(self, structure: GradientStructure) -> LearnedOptimizer:
        """The learned optimizer of this recipe for a model."""
        return LearnedOptimizer(structure, self.direction, self.residual, self.rule, self.step_size)


# The paper's (arXiv:2507.01649, section 6 and its appendix): momentum, additive rule, constant step size.
SGDM = Recipe(Momentum(decay=0.9), None, Additive(), Constant(0.1))
DS = replace(SGDM, residual=Residual(network=PointwiseMLP(width=32, hidden_layers=3), weight=1e-3))
UNF_ = replace(SGDM, residual=Residual(network=UNF(width=32, hidden_layers=3), weight=1e-3))
GMN = SetReader(GradMetaNetConfig(width=32, set_layers=2, neuron_layers=1, product_width=32, out_features=14))
GMN_PP = SetReader(GradMetaNetPlusPlusConfig(width=32, blocks=2, heads=4, product_width=32, out_features=14))


def _with(recipe: Recipe, gradmetanet: SetReader) -> Recipe:
    assert recipe.residual is not None
    return replace(recipe, residual=replace(recipe.residual, gradmetanet=gradmetanet))


# Small networks on the denoised direction, from zero output, with a step size that falls.
DENOISED = Recipe(Denoised(), None, Additive(), PowerLaw(0.045, tau=50.0, power=0.8))
DENOISED_DS = replace(DENOISED, residual=Residual(network=PointwiseMLP(8, 2), weight=0.01, output_scale=0.0))
SMALL_GMN = SetReader(GradMetaNetConfig(width=16, set_layers=1, product_width=16), max_set_size=32)

# What ships: the size of steps is the user's to set, or falls and adapts itself; features know neither scale nor time.
DEFAULT = Recipe(Denoised(), None, Normalized(), PowerLaw(0.045, tau=50.0, power=0.8, feedback=Feedback()))
DEFAULT_CELO = replace(DEFAULT, residual=Residual(ScaleFree(), PointwiseMLP(8, 2), weight=1.0, output_scale=0.0))
DEFAULT_READER = SetReader(GradMetaNetConfig(width=8, set_layers=1, product_width=8), max_set_size=32)

# Where the number of steps is known: a network for each tensor's step size and weight decay, with the set and without.
CONTROLLED = Recipe(Denoised(), None, Normalized(), Controlled())
CONTROLLED_GMN = replace(CONTROLLED, step_size=Controlled(reader=replace(DEFAULT_READER, decays=())))

RECIPES: dict[str, Recipe] = {
    "sgdm": SGDM,
    "ds": DS,
    "unf": UNF_,
    "ds+gmn": _with(DS, GMN),
    "unf+gmn": _with(UNF_, GMN),
    "ds+gmn++": _with(DS, GMN_PP),
    "unf+gmn++": _with(UNF_, GMN_PP),
    "denoised": DENOISED,
    "denoised+ds": DENOISED_DS,
    "denoised+ds+gmn": _with(DENOISED_DS, SMALL_GMN),
    "default": DEFAULT,
    "default+celo": DEFAULT_CELO,
    "controlled": CONTROLLED,
    "controlled+gmn": CONTROLLED_GMN,
    "default+gmn": _with(DEFAULT_CELO, DEFAULT_READER),
}
"""The recipes by name."""


def recipe(name: str, structure: GradientStructure) -> LearnedOptimizer:
    """An untrained learned optimizer by the name of its recipe.

    Args:
        name: the paper's ``"sgdm"`` (momentum with learned coefficients), ``"ds"`` (a perceptron for each parameter
            entry) and ``"unf"`` (a universal neural functional; its weights belong to one model), the latter two also
            with GradMetaNet (``"ds+gmn"``) or GradMetaNet++ (``"ds+gmn++"``); or one of ours, see :data:`RECIPES`.
        structure: the structure of the model, from :func:`gmn_lopt.analyze`.

    Raises:
        ValueError: there is no such recipe.

    Example:
        >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
        >>> structure = gmn_lopt.analyze(loss, {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
        >>> gmn_lopt.recipe("sgdm", structure).direction
        Momentum(decay=0.9)
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name].build(structure)
