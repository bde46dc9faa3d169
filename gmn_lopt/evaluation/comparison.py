"""``gmn-eval`` from Python: a table and a figure."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from gmn_lopt.evaluation.evaluate import EvaluationConfig, evaluate, prepare
from gmn_lopt.evaluation.report import table
from gmn_lopt.meta.task import Task
from gmn_lopt.util.threads import one_blas_thread


class Comparison(NamedTuple):
    """Optimizers, compared.

    Attributes:
        table: one line for each optimizer, in Markdown.
        figure: the test-loss curves; ``figure.savefig("curves.png")`` writes them.
        report: everything, a JSON value.
    """

    table: str
    figure: Figure
    report: dict[str, Any]


def compare(task: Task, optimizers: Sequence[str], out: str | Path | None = None, **settings: Any) -> Comparison:
    """Compare optimizers with tuned and scheduled baselines on a task, as ``gmn-eval`` does.

    BLAS has one thread from here on, as in ``gmn-eval``.

    Args:
        task: of :func:`gmn_lopt.tasks.load_task`, or one of your own.
        optimizers: as ``--optimizer`` takes them: ``"default"``, ``"runs/c10"``, ``"optax:lion:learning_rate=3e-4"``.
        out: a directory for the report and for what is finished, from which the same call goes on; None: nothing is
            kept.
        **settings: those of ``gmn-eval`` (:class:`gmn_lopt.evaluation.evaluate.EvaluationConfig`), such as ``seeds=3``.

    Raises:
        UsageError: in one line, if it cannot be done.

    Example:
        >>> from gmn_lopt.evaluation import compare
        >>> from gmn_lopt.tasks import load_task
        >>> task = load_task("linear_regression", horizon=20)
        >>> quick = {"baseline": ("adamw",), "seeds": 2, "trials_at_once": 3, "timing_rounds": 1}
        >>> found = compare(task, ["optax:sgd:learning_rate=0.05"], **quick)
        >>> [row["name"] for row in found.report["optimizers"]]
        ['adamw', 'sgd(learning_rate=0.05)']
    """
    one_blas_thread()
    config = EvaluationConfig(**settings)
    config.check()
    with tempfile.TemporaryDirectory() as temporary:
        found = evaluate(prepare(task, optimizers, Path(out or temporary), config))
    return Comparison(table(found.report), found.figure, found.report)
