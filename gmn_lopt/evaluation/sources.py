"""Where optimizers under evaluation come from: optax, runs, saved and shipped optimizers, learned_optimization."""

import difflib
import hashlib
import importlib
import inspect
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from gmn_lopt.evaluation.training import Candidate, train_step
from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.interop import learned_optimization
from gmn_lopt.meta.task import Task, task_structure
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.optimizers.saved import build_learned, digest, make_optimizer, read_saved
from gmn_lopt.util.checks import plain_numbers, settings_of_steps
from gmn_lopt.util.errors import UsageError, first_line
from gmn_lopt.util.sealed import CONFIG_FILE, is_there
from gmn_lopt.util.spec import parse_spec, split_label

OPTAX = "optax:"


@dataclass(frozen=True, eq=False)
class _Learned:
    """Makes a learned optimizer with fixed settings.

    Compared by identity: it is a key of compiled programs at each timed step, and hashing a structure takes time.
    """

    lopt: LearnedOptimizer
    settings: Mapping[str, Any]

    def __call__(self, hyper: Any) -> optax.GradientTransformation:
        return self.lopt.optimizer(hyper, **self.settings)


def find_candidates(
    specs: Sequence[str] | Mapping[str, str | optax.GradientTransformation], task: Task, taken: Sequence[str] = ()
) -> list[Candidate]:
    """Find all optimizers that ``--optimizer`` names and check that they can train the task.

    Args:
        specs: what names one each, ``[LABEL=]SOURCE[:setting=value,...]``. A source is ``optax:NAME``, a run directory
            of ``meta_train.py``, a directory written by :func:`gmn_lopt.save`, or the name of a shipped optimizer;
            ``total_steps``, ``learning_rate`` and ``weight_decay`` are the settings of a learned optimizer. Or
            ``learned_optimization:MODULE:NAME`` (:func:`gmn_lopt.interop.learned_optimization.load_optimizer`). In a
            mapping the labels are the keys, and a value may be an optax transformation.
        task: the task they are to train. Its model is analysed if there is a learned optimizer.
        taken: names that are not theirs to have, those of the baselines.

    Raises:
        UsageError: in one line, if one cannot be found, read, or applied to this task, or two have one name.
    """
    structure: GradientStructure | None = None
    found: list[Candidate] = []
    labelled = specs.items() if isinstance(specs, Mapping) else [(None, spec) for spec in specs]
    for key, spec in labelled:
        try:
            label, source, place, settings = parse_source(spec) if isinstance(spec, str) else (None, "", "", {})
            label = key or label
            if not isinstance(spec, str):
                candidate = _given(spec, label, task)
            elif place.startswith(OPTAX):
                candidate = _from_optax(source, place, settings)
            elif place.startswith(learned_optimization.PREFIX):
                candidate = _theirs(source, place, settings, task.horizon)
            else:
                structure = structure or task_structure(task)
                candidate = _learned(source, place, settings, structure, found)
            candidate = replace(candidate, name=label or candidate.name)
            if candidate.name in (*taken, *(other.name for other in found)):
                raise ValueError(f"the name {candidate.name!r} is taken; put another label in front, LABEL=...")
            _check(candidate, task)
        except (ValueError, OSError, KeyError, TypeError) as error:
            shown = spec if isinstance(spec, str) else key or type(spec).__name__
            raise UsageError(f"--optimizer {shown!r}: {first_line(error)}") from None
        found.append(candidate)
    return found


def parse_source(spec: str) -> tuple[str | None, str, str, dict[str, Any]]:
    """Split ``[LABEL=]SOURCE[:setting=value,...]``; a path that exists as written is a source, whatever it contains.

    Returns:
        The label or None, the source as it is written, and the two parts of it: the place and the settings.

    Raises:
        ValueError: in one line, if it is not of this form.

    Example:
        >>> parse_source("fast=optax:lion:learning_rate=3e-4")
        ('fast', 'optax:lion:learning_rate=3e-4', 'optax:lion', {'learning_rate': 0.0003})
    """
    if Path(spec).exists():
        return None, spec, spec, {}
    name, settings = parse_spec(spec)
    label, place = split_label(name)
    source = spec if label is None else spec.partition("=")[2].strip()
    if Path(source).exists():
        return label, source, source, {}
    return label, source, place, settings


def optax_transformation(name: str, settings: Mapping[str, Any]) -> optax.GradientTransformation:
    """Build the optimizer ``optax:NAME`` with these arguments; ``NAME`` may be ``contrib.NAME``.

    Raises:
        ValueError: in one line, if optax has no such optimizer or it does not take these arguments.
    """
    name = name.removeprefix(OPTAX)
    module, short = (optax.contrib, name.removeprefix("contrib.")) if name.startswith("contrib.") else (optax, name)
    factory = getattr(module, short, None) if short.isidentifier() and not short.startswith("_") else None
    if not callable(factory):
        near = difflib.get_close_matches(short, [n for n in dir(module) if n[0].islower()], 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"optax has no optimizer {name!r} (write optax:NAME:setting=value,setting=value){hint}")
    try:
        plain_numbers(settings)
        settings_of_steps(settings)
        tx = factory(**settings)
    except Exception as error:  # optax checks arguments in many ways
        raise ValueError(f"optax.{name} does not take these arguments: {first_line(error)}") from None
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(f"optax.{name} does not make an optimizer")
    return tx


def _given(tx: Any, label: str | None, task: Task) -> Candidate:
    """A transformation of Python. Nothing tells it from one that was made otherwise: a new fingerprint each time."""
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError("neither a name nor an optax transformation")
    if not label:
        raise ValueError('a transformation needs a name: {"my optimizer": transformation}')
    candidate = Candidate(label, "an optax transformation, from Python", uuid.uuid4().hex, lambda _: tx)
    try:
        _check(candidate, task)
    except ValueError:  # without factors; whether it is these that it needs shows with them
        return replace(candidate, needs_factors=True)
    return candidate


def _from_optax(source: str, place: str, settings: Mapping[str, Any]) -> Candidate:
    tx = optax_transformation(place, settings)
    return Candidate(place.removeprefix(OPTAX) + _shown(settings), source, _digest(source.encode()), lambda _: tx)


def _theirs(source: str, place: str, settings: Mapping[str, Any], steps: int) -> Candidate:
    """One of learned_optimization; those that have to know the number of steps get the horizon."""
    opt_fn, theta = learned_optimization.load_optimizer(place, **settings)
    code = inspect.getsourcefile(importlib.import_module(learned_optimization.module_of(place)))
    own = digest(theta) if jax.tree.leaves(theta) else ""
    fingerprint = _digest(source.encode(), Path(str(code)).read_bytes(), own.encode())
    name = place.rpartition(":")[2] + (_shown(settings) if settings else "")
    make = lambda theta: learned_optimization.to_optax(opt_fn(theta), steps)  # noqa: E731
    return Candidate(name, source, fingerprint, make, theta, False, own)


def _learned(
    source: str, place: str, settings: Mapping[str, Any], structure: GradientStructure, known: Sequence[Candidate]
) -> Candidate:
    """One that differs from a known one in its meta-parameters only shares its compiled programs."""
    path = Path(place)
    of_run = is_there(path / "optimizer")
    if path.is_dir() and not of_run and not (path / CONFIG_FILE).is_file():
        raise ValueError("neither a run of meta_train.py nor a saved optimizer: no config.json")
    saved = read_saved(path / "optimizer" if of_run else place)
    lopt, phi = build_learned(saved, structure)
    make_optimizer(lopt, phi, settings, place)  # refuses settings that it does not take
    if is_there(path):
        parts = [part for name, content in saved.contents.items() for part in (name.encode(), content)]
    else:
        parts = [place.encode(), *(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(phi))]
    if settings:
        parts.append(_shown(settings).encode())
    makes = [candidate.make for candidate in known if isinstance(candidate.make, _Learned)]
    make = next((m for m in makes if (m.lopt, m.settings) == (lopt, settings)), _Learned(lopt, settings))
    name = path.resolve().name + (_shown(settings) if settings else "")
    return Candidate(name, source, _digest(*parts), make, phi, lopt.needs_factors, digest(phi))


def _shown(settings: Mapping[str, Any]) -> str:
    return f"({', '.join(f'{key}={value}' for key, value in settings.items())})"


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def _check(candidate: Candidate, task: Task) -> None:
    """Trace one step, without computing anything."""

    def step(hyper, key, train):
        params = task.init(key)
        tx = candidate.make(hyper)
        return train_step(task.loss, tx, candidate.needs_factors, params, tx.init(params), task.sample(key, train))

    try:
        jax.eval_shape(step, candidate.hyper, jax.random.key(0), task.data["train"])
    except Exception as error:  # whatever an optimizer may raise: the user needs its name
        raise ValueError(f"cannot train {task.name}: {first_line(error)}") from None
