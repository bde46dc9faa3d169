"""The fair protocol: against baselines that are tuned and scheduled, compared at the end of the horizon.

Each baseline has a warm-up and a cosine to zero at the horizon, and the same number of trials on a grid of its peak
rate and weight decay, which goes on until the best is inside for all of them. The validation loss at the end chooses.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gmn_lopt.evaluation.baselines import BASELINES, Baseline
from gmn_lopt.evaluation.baselines.base import Scheduled
from gmn_lopt.evaluation.protocol import Target
from gmn_lopt.evaluation.runs import Runs, Tuned
from gmn_lopt.evaluation.search import Place, best_place, is_inside, next_places
from gmn_lopt.evaluation.tables import settings_shown
from gmn_lopt.evaluation.training import Candidate
from gmn_lopt.meta.task import measured_on
from gmn_lopt.util.errors import UsageError


@dataclass(frozen=True)
class Fair:
    """The fair protocol.

    Attributes:
        baselines: what others are compared with.
        at_once: trials of each baseline in one round of the search, trained at once.
        most_rounds: rounds after which the search ends though the best of a baseline is at an edge. The report says so.
        tuning_seeds: seeds that trials are taken from, those behind the report's.
    """

    baselines: tuple[Baseline, ...] = BASELINES
    at_once: int = 9
    most_rounds: int = 6
    tuning_seeds: int = 2

    name: ClassVar[str] = "fair"
    measures: ClassVar[Mapping[str, tuple[str, int]]] = {
        "final_test_loss": ("final test loss", 4),
        "steps_to_goal": ("steps to it", 0),
        "seconds_to_goal": ("seconds to it", 2),
        "best_test_loss": ("best test loss", 4),
        "mean_training_loss": ("mean training loss", 4),
    }

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the baselines."""
        return tuple(baseline.name for baseline in self.baselines)

    def tune(self, runs: Runs, smoothing: int) -> Tuned:
        """Search each baseline's settings on the validation split, and train the best from the report's seeds.

        Raises:
            UsageError: if no setting of a baseline has a finite validation loss.
        """
        horizon = runs.task.horizon
        seeds = [runs.seeds[-1] + 1 + i for i in range(self.tuning_seeds)]
        # Only the last loss counts; a few before it let an interrupt be heard.
        every = horizon // max(n for n in range(1, 6) if horizon % n == 0)
        trials = replace(runs, task=measured_on(runs.task, "valid"), seeds=seeds, eval_every=every)
        losses: list[dict[Place, list[float]]] = [{} for _ in self.baselines]

        for number in range(1, self.most_rounds + 1):
            places = [
                next_places(_means(tried), baseline.axes, self.at_once)
                for baseline, tried in zip(self.baselines, losses)
            ]
            units = {
                f"{baseline.name} round {number}": _candidate(baseline, horizon, own, seeds)
                for baseline, own in zip(self.baselines, places)
            }
            curves = trials.train(units, grid=True, what=f"tuning, round {number}")
            for tried, own, found in zip(losses, places, curves):
                tried.update(zip(own, found.test_loss[:, :, -1].tolist()))
            if all(is_inside(_means(tried), baseline.axes) for baseline, tried in zip(self.baselines, losses)):
                break

        chosen, facts = [], []
        for baseline, tried in zip(self.baselines, losses):
            means = _means(tried)
            best = best_place(means, baseline.axes)
            if not math.isfinite(means[best]):
                raise UsageError(f"no setting of {baseline.name} reaches a finite validation loss: check the task")
            chosen.append(_chosen(baseline, horizon, best))
            facts.append(
                {
                    "name": baseline.name,
                    "settings": baseline.settings(best),
                    "inside": is_inside(means, baseline.axes),
                    "trials": [
                        {"settings": baseline.settings(place), "validation_loss": each} for place, each in tried.items()
                    ],
                }
            )
        return Tuned(chosen, runs.train({f"baseline {own.name}": own for own in chosen}, what="baselines"), facts)

    def goal(self, curves: Sequence[Float[np.ndarray, "S E"]], steps: Int[np.ndarray, "E"]) -> tuple[int, Target]:
        """The last loss of each seed, of the baseline whose mean over seeds is the lowest.

        It is the best on the test split, which is more than the validation split could know.

        Raises:
            UsageError: if each baseline has a seed whose last loss is not finite.
        """
        finals = [own[:, -1] for own in curves]
        best = int(np.argmin([final.mean() for final in finals]))
        if not np.isfinite(finals[best]).all():
            raise UsageError("no baseline ends with a finite test loss on every seed: check the task")
        return best, Target(finals[best], np.full(len(finals[best]), steps[-1]))

    def facts(self, tuned: Tuned, seeds: Sequence[int], goal: Target, of: int) -> dict[str, Any]:
        """What the report says of the baselines: the entries ``baselines`` and ``goal``."""
        per_seed = [{"seed": seed, "loss": float(loss)} for seed, loss in zip(seeds, goal.loss)]
        return {"baselines": tuned.facts, "goal": {"name": tuned.candidates[of].name, "seeds": per_seed}}


def _means(tried: Mapping[Place, Sequence[float]]) -> dict[Place, float]:
    return {place: float(np.mean(losses)) for place, losses in tried.items()}


def _candidate(baseline: Baseline, horizon: int, places: Sequence[Place], seeds: Sequence[int]) -> Candidate:
    """A baseline at several places of its grid at once, from these seeds."""
    settings = [baseline.settings(place) for place in places]
    source = f"{baseline.name}:{' '.join(map(settings_shown, settings))}"
    arrays = {axis.name: jnp.array([each[axis.name] for each in settings]) for axis in baseline.axes}
    make = Scheduled(baseline.construct, horizon)
    return Candidate(baseline.name, source, f"{source} seeds {[*seeds]}", make, arrays)


def _chosen(baseline: Baseline, horizon: int, place: Place) -> Candidate:
    """A baseline at one place of its grid."""
    grid = _candidate(baseline, horizon, [place], ())
    return replace(grid, fingerprint=grid.source, hyper={name: array[0] for name, array in grid.hyper.items()})
