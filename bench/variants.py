"""What bench/estimators.py compares: objects to copy, each a name and what differs from the paper's PES on ``ds``."""

from dataclasses import dataclass, replace
from typing import Any

from gmn_lopt.networks.gradmetanet import GradMetaNetConfig
from gmn_lopt.networks.pointwise import PointwiseMLP
from gmn_lopt.optimizers.features import ScaleFree
from gmn_lopt.optimizers.recipes import DS, Recipe
from gmn_lopt.optimizers.residual import Residual
from gmn_lopt.optimizers.rules import Additive
from gmn_lopt.optimizers.set_reader import SetReader
from gmn_lopt.optimizers.step_size import Feedback, PowerLaw


@dataclass(frozen=True)
class Variant:
    """How to meta-train, and what.

    Attributes:
        stages: as in ``meta_train.py --stage``, without meta-steps: they follow from the budget, of which every stage
            gets an equal part.
        recipe: the learned optimizer.
    """

    stages: tuple[str, ...] = ("pes",)
    recipe: Recipe = DS


def with_gmn(reads: SetReader | None = None, width: int = 32, **gmn: Any) -> Recipe:
    """``ds`` of this width with GradMetaNet; by default of the size that it was found to add the most with."""
    config = GradMetaNetConfig(**{"width": 16, "set_layers": 1, "product_width": 16} | gmn)
    reader = replace(reads or SetReader(), network=config)
    return replace(DS, residual=Residual(network=PointwiseMLP(width), gradmetanet=reader))


ESTIMATORS: dict[str, Variant] = {
    "pes": Variant(),
    "es": Variant(("es",)),
    "nres": Variant(("nres",)),
    **{f"truncated-{k}": Variant((f"truncated:truncation={k}",)) for k in (10, 25, 50, 100)},
    "truncated-25-pes": Variant(("truncated:truncation=25", "pes")),
}

# Each changes one thing of "nres", the best of the evolution strategies ...
ABLATIONS: dict[str, Variant] = {
    "pairs-2": Variant(("nres:pairs=2",)),
    "truncation-10": Variant(("nres:truncation=10",)),
    "sigma-0.1": Variant(("nres:sigma=0.1",)),
    "coefficient-rate-0": Variant(("nres:coefficient_rate=0",)),
    "final": Variant(("nres:objective=final",)),
    "last-layer-0": Variant(("nres",), replace(DS, residual=Residual(output_scale=0.0))),
    "bound-1": Variant(("nres",), replace(DS, rule=Additive(bound=1.0))),
    "decay": Variant(("nres",), replace(DS, step_size=PowerLaw())),
    "adapt": Variant(("nres",), replace(DS, step_size=PowerLaw(feedback=Feedback()))),
    "width-8": Variant(("nres",), replace(DS, residual=Residual(network=PointwiseMLP(8)))),
    "features-celo": Variant(("nres",), replace(DS, residual=Residual(features=ScaleFree()))),
    # ... or of GradMetaNet: its size, how much of the set it reads, and what it remembers of it.
    "falling": Variant(("truncated:truncation=25,schedule=cosine",)),
    **{
        f"falling-gmn{name}": Variant(("truncated:truncation=25,schedule=cosine",), recipe)
        for name, recipe in {
            "": with_gmn(),
            "-no-averages": with_gmn(SetReader(decays=())),
            "-set-32": with_gmn(SetReader(max_set_size=32)),
            "-width-8": with_gmn(width=8),
            "-set-layers-2": with_gmn(set_layers=2),
        }.items()
    },
}
