"""The protocol of the paper's table: step reduction against Adam, tuned at a constant rate (arXiv:2507.01649).

*Step reduction* is how many times fewer steps than tuned Adam an optimizer takes to Adam's best test loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from gmn_lopt.evaluation import protocol
from gmn_lopt.evaluation.protocol import Target
from gmn_lopt.evaluation.runs import Runs, Tuned
from gmn_lopt.evaluation.training import Candidate, Curves
from gmn_lopt.util.errors import UsageError

LEARNING_RATES = tuple(0.0005 * j for j in range(1, 21))
"""The grid that Adam is tuned on."""


def adam(learning_rate: Any) -> optax.GradientTransformation:
    """The baseline, Adam with optax's defaults."""
    return optax.adam(learning_rate)


@dataclass(frozen=True)
class Paper:
    """Adam at the one of twenty rates that has the best mean over seeds of the best test loss.

    Attributes:
        at_once: rates trained at once.
    """

    at_once: int = 5

    name: ClassVar[str] = "paper"
    names: ClassVar[tuple[str, ...]] = ("adam",)
    measures: ClassVar[Mapping[str, tuple[str, int]]] = {
        "step_reduction": ("step reduction", 2),
        "training_time_speed_up": ("training-time speed-up", 2),
        "best_test_loss": ("best test loss", 4),
        "final_test_loss": ("final test loss", 4),
        "mean_training_loss": ("mean training loss", 4),
    }

    def tune(self, runs: Runs, smoothing: int) -> Tuned:
        """Train Adam at all rates, from the report's own seeds; one of those runs is the baseline's.

        Raises:
            UsageError: if no rate has a finite test loss on every seed.
        """
        parts = [LEARNING_RATES[i : i + self.at_once] for i in range(0, len(LEARNING_RATES), self.at_once)]
        units = {
            f"adam {part[0]:g}-{part[-1]:g}": Candidate("adam", "", "adam", adam, jnp.array(part)) for part in parts
        }
        grid = Curves(*(np.concatenate(each) for each in zip(*runs.train(units, grid=True))))
        smoothed = protocol.smooth(grid.test_loss, smoothing)
        chosen = best_setting(smoothed)
        rate, last = LEARNING_RATES[chosen], len(LEARNING_RATES) - 1
        candidate = Candidate("adam", f"optax:adam:learning_rate={rate:g}", "adam", adam, jnp.array(rate))
        searched = [
            {"learning_rate": rate, "best_test_loss_mean": float(best.mean()), "best_test_loss": best.tolist()}
            for rate, best in zip(LEARNING_RATES, smoothed.min(axis=2))
        ]
        facts = {"name": "adam", "learning_rate": rate, "at_edge_of_grid": chosen in (0, last), "grid": searched}
        return Tuned([candidate], [Curves(*(part[chosen] for part in grid))], facts)

    def goal(self, curves: Sequence[Float[np.ndarray, "S E"]], steps: Int[np.ndarray, "E"]) -> tuple[int, Target]:
        """Adam's best loss ``L*`` of each seed, and the first step ``n`` that has it."""
        (own,) = curves
        return 0, Target(own.min(axis=1), steps[np.argmin(own, axis=1)])

    def facts(self, tuned: Tuned, seeds: Sequence[int], goal: Target, of: int) -> dict[str, Any]:
        """What the report says of the baseline: the entry ``baseline``."""
        per_seed = [
            {"seed": seed, "best_test_loss": float(loss), "step": int(step)}
            for seed, loss, step in zip(seeds, goal.loss, goal.step)
        ]
        return {"baseline": tuned.facts | {"seeds": per_seed}}


def best_setting(curves: Float[np.ndarray, "H S E"]) -> int:
    """The setting of a grid with the best mean over seeds of the best test loss (the first of equals).

    Raises:
        UsageError: if no setting has a finite loss on every seed.
    """
    means = curves.min(axis=2).mean(axis=1)
    if not np.isfinite(means).any():
        raise UsageError("no learning rate of Adam's grid reaches a finite test loss on every seed: check the task")
    return int(np.argmin(means))
