"""Training runs of which each that is finished is kept, so that an interrupted evaluation goes on where it stopped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from gmn_lopt.evaluation.results import Results
from gmn_lopt.evaluation.training import Candidate, Curves, training_curves
from gmn_lopt.meta.task import Task
from gmn_lopt.util.progress import progress


@dataclass(frozen=True)
class Runs:
    """Where optimizers are trained, and where the results are kept.

    Attributes:
        task: the task, with its horizon.
        seeds: the seeds of the report.
        eval_every: steps between evaluations.
        results: what has been computed before.
    """

    task: Task
    seeds: Sequence[int]
    eval_every: int
    results: Results

    def train(self, units: Mapping[str, Candidate], *, grid: bool = False, what: str = "training") -> list[Curves]:
        """The curves of each unit; what is not among the results is trained, and kept.

        Args:
            units: a name for each that tells it from all others of the evaluation, and the optimizer.
            grid: whether the arrays of each have an axis in front, over settings; the curves have it as well.
            what: in front of the count that is shown.
        """
        found = {name: self.results.load(name, candidate.fingerprint) for name, candidate in units.items()}
        pending = sum(_settings(units[name], grid) for name, arrays in found.items() if arrays is None)
        total = pending * len(self.seeds) * self.task.horizon
        curves = []
        with progress(total, what, "steps", scale=True, disable=not pending) as bar:
            for name, candidate in units.items():
                arrays = found[name]
                if arrays is None:
                    bar.set_description(candidate.name, refresh=False)
                    arrays = training_curves(
                        *(self.task, candidate, self.seeds, self.eval_every),
                        grid=grid,
                        record_weights=weights(self.task) == 2,
                        progress=bar.update,
                    )._asdict()
                    self.results.save(name, candidate.fingerprint, arrays)
                curves.append(Curves(**arrays))
        return curves


class Tuned(NamedTuple):
    """Baselines as a protocol has tuned them.

    Attributes:
        candidates: each with the settings that were chosen.
        curves: of each, from the report's seeds.
        facts: what the report says of the search, JSON values.
    """

    candidates: list[Candidate]
    curves: list[Curves]
    facts: Any


def weights(task: Task) -> int:
    """The number of a task's parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))


def _settings(candidate: Candidate, grid: bool) -> int:
    return len(jax.tree.leaves(candidate.hyper)[0]) if grid else 1
