"""Tasks, one per file: ``tasks/NAME.py`` defines ``make(data_dir=None, **settings) -> Task``.

To add a task, copy the file that is nearest to yours. Nothing else has to be told about it: tasks are found by the name
of their file. Files whose name starts with an underscore hold what tasks share.
"""

import importlib
import inspect
from pathlib import Path
from typing import Any

from gmn_lopt.meta.task import Task


def task_names() -> list[str]:
    """The names of all tasks, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def load_task(name: str, data_dir: str | None = None, **settings: Any) -> Task:
    """Make a task.

    Args:
        name: one of :func:`task_names`.
        data_dir: the TensorFlow Datasets directory that holds the task's data; None for its default place.
        **settings: handed on to the task's ``make``, e.g. ``hidden=(64,)`` for another width (``hidden=64``
            says the same).

    Raises:
        ValueError: no such task, no such setting, or a setting the task refuses.
        tasks._cache.DataError: the task's data is not there and could not be brought.
    """
    if name not in task_names():
        raise ValueError(f"unknown task {name!r}; there are: {', '.join(task_names())}")
    module = importlib.import_module(f"tasks.{name}")
    make = getattr(module, "make", None)
    if make is None:
        raise ValueError(f"tasks/{name}.py has no function make(data_dir); see tasks/digits_mlp.py for one")
    parameters = inspect.signature(make).parameters
    known = [parameter for parameter in parameters if parameter != "data_dir"]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"task {name!r} has no setting {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
    # One hidden layer is the usual case: hidden=64 says the same as hidden=(64,).
    several = {key for key in settings if isinstance(parameters[key].default, tuple)}
    settings = {k: (v,) if k in several and not isinstance(v, list | tuple) else v for k, v in settings.items()}
    task: Task = make(data_dir, **settings)
    if task.name != name:
        raise ValueError(f"tasks/{name}.py makes a task named {task.name!r}; a task is named like its file")
    return task
