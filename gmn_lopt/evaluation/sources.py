"""Where optimizers under evaluation come from: ``optax:NAME:...``, a run, a saved optimizer, a shipped name."""

import ast
import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from gmn_lopt.evaluation.candidate import Candidate, train_step
from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.meta.task import Task
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.optimizers.saved import digest, load_learned, make_optimizer, shipped_names
from gmn_lopt.util.errors import first_line


class SourceError(ValueError):
    """An optimizer that was asked for cannot be had, or not for this task."""


def adam(learning_rate: Any) -> optax.GradientTransformation:
    """The baseline, Adam with optax's defaults."""
    return optax.adam(learning_rate)


@dataclass(frozen=True)
class _Optax:
    """Makes the optimizer of an ``optax:`` source; equal sources are equal, and so share compiled programs."""

    source: str

    def __call__(self, hyper: Any) -> optax.GradientTransformation:
        return optax_transformation(self.source)


@dataclass(frozen=True, eq=False)
class _Learned:
    """Makes a learned optimizer with fixed settings.

    Compared by identity: it is a key of compiled programs at each timed step, and hashing a structure takes time.
    """

    lopt: LearnedOptimizer
    settings: Mapping[str, Any]

    def __call__(self, hyper: Any) -> optax.GradientTransformation:
        return self.lopt.optimizer(hyper, **self.settings)


def split_label(spec: str) -> tuple[str | None, str]:
    """Split ``label=source``; the label is None in ``optax:...``, in a path that exists as written, and where what
    stands before the first ``=`` is an optimizer with the name of its first setting.
    """
    label, equals, source = spec.partition("=")
    if not equals or spec.startswith("optax:") or Path(spec).exists():
        return None, spec
    before, colon, setting = label.rpartition(":")
    if colon and setting.strip().isidentifier() and _is_learned(before):
        return None, spec
    if not label.strip() or not source.strip():
        raise SourceError(f"--optimizer {spec!r}: write LABEL=SOURCE, with neither of them empty")
    return label.strip(), source.strip()


def split_settings(source: str, flag: str = "--optimizer") -> tuple[str, dict[str, Any]]:
    """Split ``PLACE[:key=value,...]``, the source of a learned optimizer or a task, into the place and the settings.

    Values are Python literals. A path that exists as written is one, whatever it contains.

    Args:
        source: what to split.
        flag: where it was given, for the message.

    Raises:
        SourceError: if what follows the colon is not of this form.
    """
    found = re.match(r"(.+?):(\s*[A-Za-z_]\w*\s*=.*)$", source)
    if Path(source).exists() or found is None:
        return source, {}
    try:
        return found[1], _literals(found[2])
    except (SyntaxError, ValueError):
        raise SourceError(
            f"{flag} {source!r}: write {found[1]}:key=value,key=value with numbers, strings or other literals as values"
        ) from None


def parse_optax(spec: str) -> tuple[str, dict[str, Any]]:
    """Parse ``optax:NAME:key=value,key=value`` into the factory's name and its arguments.

    Values are Python literals, read by ``ast.literal_eval``; nothing is evaluated.

    Raises:
        SourceError: if the arguments are not of this form.
    """
    name, _, arguments = spec.removeprefix("optax:").partition(":")
    try:
        return name.strip(), _literals(arguments)
    except (SyntaxError, ValueError):
        raise SourceError(
            f"--optimizer {spec!r}: write optax:NAME:key=value,key=value with numbers, strings or other literals as "
            "values, for example optax:lion:learning_rate=3e-4"
        ) from None


def optax_transformation(spec: str) -> optax.GradientTransformation:
    """Build the optimizer that ``optax:NAME:key=value,...`` names; ``NAME`` may be ``contrib.NAME``.

    Raises:
        SourceError: if optax has no such optimizer or it does not take these arguments.
    """
    name, arguments = parse_optax(spec)
    module, short = (optax.contrib, name.removeprefix("contrib.")) if name.startswith("contrib.") else (optax, name)
    factory = getattr(module, short, None) if short.isidentifier() and not short.startswith("_") else None
    if not callable(factory):
        near = difflib.get_close_matches(short, [n for n in dir(module) if n[0].islower()], 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise SourceError(f"--optimizer {spec!r}: optax has no optimizer {name!r}{hint}")
    try:
        tx = factory(**arguments)
    except Exception as error:  # optax checks arguments in many ways
        raise SourceError(
            f"--optimizer {spec!r}: optax.{name} does not take these arguments: {first_line(error)}"
        ) from None
    if not isinstance(tx, optax.GradientTransformation):
        raise SourceError(f"--optimizer {spec!r}: optax.{name} does not make an optimizer")
    return tx


def find_candidate(
    spec: str, task: Task, structure: GradientStructure | None, known: Sequence[Candidate] = ()
) -> Candidate:
    """Find the optimizer that a ``--optimizer`` argument names and check that it can train the task.

    Args:
        spec: ``[label=]`` and then ``optax:NAME:key=value,...``, or the place of a learned optimizer: a run directory
            of ``meta_train.py``, a directory written by :func:`gmn_lopt.save`, or the name of a shipped optimizer;
            after a place ``:key=value,...`` where the optimizer takes settings, such as ``learning_rate``.
        task: the task it is to train.
        structure: the gradient structure of the task's model; only learned optimizers need it.
        known: the candidates found before. A learned optimizer that differs from one of them in its meta-parameters
            only shares its compiled programs.

    Raises:
        SourceError: in one line, if it cannot be found, read, or applied to this task.
    """
    label, source = split_label(spec)
    if source.startswith("optax:"):
        optax_transformation(source)
        name, arguments = parse_optax(source)
        candidate = Candidate(label or f"{name}{_shown(arguments)}", source, _digest(source.encode()), _Optax(source))
    else:
        if structure is None:
            raise SourceError(f"--optimizer {spec!r}: a learned optimizer needs the structure of the task's model")
        candidate = _learned(label, source, structure, known)
    _check(candidate, task)
    return candidate


def _literals(arguments: str) -> dict[str, Any]:
    """Read ``key=value,...``, with Python literals as values; nothing is evaluated."""
    call = ast.parse(f"f({arguments})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError
    values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    if len(values) != len(call.keywords):
        raise ValueError
    return values


def _shown(arguments: Mapping[str, Any]) -> str:
    return f"({', '.join(f'{key}={value}' for key, value in arguments.items())})"


def _is_learned(place: str) -> bool:
    return Path(place).is_dir() or place in shipped_names()


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def _learned(label: str | None, source: str, structure: GradientStructure, known: Sequence[Candidate]) -> Candidate:
    place, settings = split_settings(source)
    path = Path(place)
    directory = path / "optimizer" if (path / "optimizer").is_dir() else path
    if path.is_dir() and not (directory / "config.json").is_file():
        raise SourceError(
            f"--optimizer {source!r} is neither a run of meta_train.py nor a saved optimizer: no config.json"
        )
    try:
        lopt, phi = load_learned(str(directory) if path.is_dir() else place, structure)
        make_optimizer(lopt, phi, settings, place)  # refuses settings that it does not take
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise SourceError(f"--optimizer {source!r}: {first_line(error)}") from None
    if directory.is_dir():
        files = sorted(file for file in directory.rglob("*") if file.is_file())
        parts = [part for f in files for part in (str(f.relative_to(directory)).encode(), f.read_bytes())]
    else:
        parts = [place.encode(), *(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(phi))]
    if settings:
        parts.append(_shown(settings).encode())
    makes = [candidate.make for candidate in known if isinstance(candidate.make, _Learned)]
    make = next((m for m in makes if (m.lopt, m.settings) == (lopt, settings)), _Learned(lopt, settings))
    name = label or path.resolve().name + (_shown(settings) if settings else "")
    return Candidate(name, source, _digest(*parts), make, phi, lopt.needs_factors, digest(phi))


def _check(candidate: Candidate, task: Task) -> None:
    """Trace one step, without computing anything."""

    def step(hyper, key, train):
        params = task.init(key)
        tx = candidate.make(hyper)
        return train_step(task.loss, tx, candidate.needs_factors, params, tx.init(params), task.sample(key, train))

    try:
        jax.eval_shape(step, candidate.hyper, jax.random.key(0), task.data["train"])
    except Exception as error:  # whatever an optimizer may raise: the user needs its name
        raise SourceError(f"--optimizer {candidate.source!r} cannot train {task.name}: {first_line(error)}") from None
