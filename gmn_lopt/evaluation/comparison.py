"""``gmn-eval`` from Python: a table and a figure."""

import difflib
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import optax
from matplotlib.figure import Figure

from gmn_lopt.evaluation.evaluate import EvaluationConfig, evaluate, prepare
from gmn_lopt.evaluation.report import table
from gmn_lopt.meta.task import Task
from gmn_lopt.util.errors import UsageError
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


def compare(
    task: Task,
    optimizers: Sequence[str] | Mapping[str, str | optax.GradientTransformation],
    out: str | Path | None = None,
    **settings: Any,
) -> Comparison:
    """Compare optimizers with tuned and scheduled baselines on a task, as ``gmn-eval`` does.

    BLAS has one thread from here on, as in ``gmn-eval``.

    Args:
        task: of :func:`gmn_lopt.tasks.load_task`, or one of your own, :class:`gmn_lopt.meta.Task`, with its data in
            memory.
        optimizers: a list of what ``--optimizer`` takes: a shipped optimizer, ``"default:total_steps=500"``, a run or a
            directory of :func:`gmn_lopt.save`, ``"runs/c10"``, or ``"optax:lion:learning_rate=3e-4"``. Or a dictionary
            of names for the table and such strings or optax transformations, those that read factors included.
        out: a directory for the report and for what is finished, from which the same call goes on; None: nothing is
            kept. Transformations that were given as such are trained anew: nothing says whether they are the same.
        **settings: those of ``gmn-eval`` (:class:`gmn_lopt.evaluation.evaluate.EvaluationConfig`), such as ``seeds=3``.

    Raises:
        UsageError: in one line, if it cannot be done.

    Example:
        >>> from gmn_lopt.evaluation import compare
        >>> from gmn_lopt.meta import Task
        >>> x = jax.random.normal(jax.random.key(0), (96, 4))
        >>> examples = {"x": x, "y": x.sum(1, keepdims=True)}
        >>> part = lambda start, end: jax.tree.map(lambda a: a[start:end], examples)
        >>> task = Task(
        ...     name="sums",
        ...     horizon=20,
        ...     batch_size=8,
        ...     loss_cap=100.0,
        ...     data={"train": part(0, 32), "valid": part(32, 64), "test": part(64, 96)},
        ...     init=lambda key: {"w": jnp.zeros((4, 1))},
        ...     loss=lambda params, batch: jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2),
        ...     sample=lambda key, split: jax.tree.map(lambda a: jax.random.choice(key, a, (8,)), split),
        ... )
        >>> quick = {"baseline": ("adamw",), "seeds": 2, "trials_at_once": 3, "timing_rounds": 1}
        >>> found = compare(task, {"SGD": optax.sgd(0.05), "lion": "optax:lion:learning_rate=0.05"}, **quick)
        >>> [row["name"] for row in found.report["optimizers"]]
        ['adamw', 'SGD', 'lion']
    """
    try:
        config = _config(settings)
        if not isinstance(task, Task):
            raise UsageError(f"task must be a gmn_lopt.meta.Task, such as load_task makes, not a {type(task).__name__}")
        one = isinstance(optimizers, str | optax.GradientTransformation)  # the latter is a tuple, too
        if one or not isinstance(optimizers, Sequence | Mapping):
            raise UsageError("optimizers must be a list of names, or a dictionary of names and optimizers")
        one_blas_thread()
        with tempfile.TemporaryDirectory() as temporary:
            found = evaluate(prepare(task, optimizers, Path(out or temporary), config))
    except UsageError as error:
        raise UsageError(_without_flags(str(error))) from None
    return Comparison(table(found.report), found.figure, found.report)


def _config(settings: Mapping[str, Any]) -> EvaluationConfig:
    known = [field.name for field in fields(EvaluationConfig)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UsageError(f"there is no setting {name!r}; {hint}")
    if isinstance(settings.get("baseline"), str):
        settings = {**settings, "baseline": (settings["baseline"],)}
    config = EvaluationConfig(**settings)
    config.check()
    return config


def _without_flags(message: str) -> str:
    """The message with arguments of Python in the place of the command's flags."""
    return re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda flag: flag[1].replace("-", "_"), message)
