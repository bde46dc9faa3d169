"""Tasks, one per file: ``tasks/NAME.py`` defines ``make(data_dir=None, **settings) -> Task``.

To add a task, copy the file that is nearest to yours. Nothing else has to be told about it: tasks are found by the name
of their file. The files without a ``make`` hold what tasks share. A task may also live anywhere that Python can import:
``package.module:make`` names it, and ``learned_optimization:MODULE:NAME`` one of google/learned_optimization.
"""

import importlib
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np

# Relative: this folder is installed as gmn_lopt.tasks, and ``import tasks`` fails rather than make a second copy of it.
from ..interop import learned_optimization
from ..meta.task import Task
from ..util.checks import plain_numbers
from ..util.codec import from_json, to_json

TASK_ERRORS = (ImportError, OSError, RuntimeError, TypeError, ValueError, ArithmeticError, AttributeError, SyntaxError)
"""What loading a task may raise that is the fault of its name, its settings, or its data."""


def task_names() -> list[str]:
    """The names of all tasks of the package, sorted."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(file.stem for file in files if re.search(r"^(def make\(|make = )", file.read_text(), re.MULTILINE))


def load_task(spec: str, data_dir: str | None = None, **settings: Any) -> Task:
    """Make a task.

    Args:
        spec: one of :func:`task_names`, or ``package.module:make`` for a function of any module that can be imported,
            or ``learned_optimization:MODULE:NAME`` (:func:`gmn_lopt.interop.learned_optimization.load_task`).
        data_dir: the TensorFlow Datasets directory that holds the task's data; None for its default place.
            learned_optimization's tasks look in ``$TFDS_DATA_DIR`` instead.
        **settings: handed on to the task's ``make``, e.g. ``hidden=(64,)`` for another width (``hidden=64``
            says the same).

    Raises:
        ValueError: no such task, no such setting, or a setting the task refuses.
        gmn_lopt.tasks.data.cache.DataError: the task's data is not there and could not be brought.

    Example:
        >>> from gmn_lopt.tasks import load_task
        >>> task = load_task("digits_mlp", hidden=(16, 16))
        >>> task.name, task.horizon, task.data["test"]["image"].shape
        ('digits_mlp', 500, (360, 64))
    """
    if spec.startswith(learned_optimization.PREFIX):
        return learned_optimization.load_task(spec, **settings)
    make = _find(spec)
    parameters = inspect.signature(make).parameters
    known = [parameter for parameter in parameters if parameter != "data_dir"]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"task {spec!r} has no setting {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
    # One hidden layer is the usual case: hidden=64 says the same as hidden=(64,).
    several = {key for key in settings if isinstance(parameters[key].default, tuple)}
    settings = {k: (v,) if k in several and not isinstance(v, list | tuple) else v for k, v in settings.items()}
    task = make(data_dir, **_checked(make, settings))
    if not isinstance(task, Task):
        raise ValueError(f"task {spec!r} makes a {type(task).__name__}, not a gmn_lopt.meta.Task")
    if task.name != spec and ":" not in spec:
        raise ValueError(f"tasks/{spec}.py makes a task named {task.name!r}; a task is named like its file")
    return task


def task_module(spec: str) -> str:
    """The name of the module in which a task is made.

    Example:
        >>> task_module("digits_mlp"), task_module("mine:make")
        ('gmn_lopt.tasks.digits_mlp', 'mine')
    """
    if spec.startswith(learned_optimization.PREFIX):
        return learned_optimization.module_of(spec)
    return spec.partition(":")[0] if ":" in spec else f"{__name__}.{spec}"


def _checked(make: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, of the types that ``make`` says they have, where these are plain ones."""
    settings = {name: x.item() if isinstance(x, np.generic) else x for name, x in settings.items()}
    plain_numbers(settings)
    try:
        hints = inspect.get_annotations(make, eval_str=True)
    except NameError:  # of a module of its own, which imports them for type checkers only
        hints = {}
    known = {name for name in settings if _is_plain(hints.get(name))}
    return {name: from_json(to_json(x), hints[name], name) if name in known else x for name, x in settings.items()}


def _is_plain(hint: Any) -> bool:
    """Whether a type is that of a number, a truth value or text, or of lists of such, or one of several."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return args[1:] == (...,) and _is_plain(args[0])
    if origin in (typing.Union, types.UnionType):
        return all(arg is type(None) or _is_plain(arg) for arg in args)
    return hint in (bool, int, float, str)


def _find(spec: str) -> Any:
    module, colon, function = spec.partition(":")
    if not colon:
        if spec not in task_names():
            names = ", ".join(task_names())
            raise ValueError(f"unknown task {spec!r}; there are: {names}; or any as package.module:make")
        return importlib.import_module(task_module(spec)).make
    try:
        make = getattr(importlib.import_module(module), function, None)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f"task {spec!r}: {error}; what is not installed has to be on PYTHONPATH") from error
    if not callable(make) or not inspect.signature(make).parameters:
        raise ValueError(f"task {spec!r}: {module} has no function {function}(data_dir=None); copy one of tasks/")
    return make
