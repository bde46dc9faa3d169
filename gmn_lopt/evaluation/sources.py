"""Where optimizers under evaluation come from: ``optax:NAME:...``, a run, a saved optimizer, a shipped name."""

import ast
import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from gmn_lopt.errors import first_line
from gmn_lopt.evaluation.candidate import Candidate, train_step
from gmn_lopt.meta.task import Task
from gmn_lopt.structure import GradientStructure


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


def split_label(spec: str) -> tuple[str | None, str]:
    """Split ``label=source``; the label is None in ``optax:...`` and in a path that exists as written."""
    label, equals, source = spec.partition("=")
    if not equals or spec.startswith("optax:") or Path(spec).exists():
        return None, spec
    if not label.strip() or not source.strip():
        raise SourceError(f"--optimizer {spec!r}: write LABEL=SOURCE, with neither of them empty")
    return label.strip(), source.strip()


def parse_optax(spec: str) -> tuple[str, dict[str, Any]]:
    """Parse ``optax:NAME:key=value,key=value`` into the factory's name and its arguments.

    Values are Python literals, read by ``ast.literal_eval``; nothing is evaluated.

    Raises:
        SourceError: if the arguments are not of this form.
    """
    name, _, arguments = spec.removeprefix("optax:").partition(":")
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
        if len(values) != len(call.keywords):
            raise ValueError
    except (SyntaxError, ValueError):
        raise SourceError(
            f"--optimizer {spec!r}: write optax:NAME:key=value,key=value with numbers, strings or other literals as "
            "values, for example optax:lion:learning_rate=3e-4"
        ) from None
    return name.strip(), values


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
        spec: ``[label=]`` and then ``optax:NAME:key=value,...``, a run directory of ``meta_train.py``, a directory
            written by :func:`gmn_lopt.save`, or the name of a shipped optimizer.
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
        shown = f"{name}({', '.join(f'{key}={value}' for key, value in arguments.items())})"
        candidate = Candidate(label or shown, source, _digest(source.encode()), _Optax(source))
    else:
        if structure is None:
            raise SourceError(f"--optimizer {spec!r}: a learned optimizer needs the structure of the task's model")
        candidate = _learned(label, source, structure, known)
    _check(candidate, task)
    return candidate


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _learned(label: str | None, source: str, structure: GradientStructure, known: Sequence[Candidate]) -> Candidate:
    # Imported here: what needs no learned optimizer shall not wait for flax.
    from gmn_lopt.serialization import load_learned

    path = Path(source)
    directory = path / "optimizer" if (path / "optimizer").is_dir() else path
    if path.is_dir() and not (directory / "config.json").is_file():
        raise SourceError(
            f"--optimizer {source!r} is neither a run of meta_train.py nor a saved optimizer: no config.json"
        )
    try:
        lopt, phi = load_learned(str(directory) if path.is_dir() else source, structure)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise SourceError(f"--optimizer {source!r}: {first_line(error)}") from None
    if directory.is_dir():
        files = sorted(file for file in directory.rglob("*") if file.is_file())
        digest = _digest(*(part for f in files for part in (str(f.relative_to(directory)).encode(), f.read_bytes())))
    else:
        digest = _digest(source.encode(), *(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(phi)))
    makes = [candidate.make for candidate in known]
    make = next((make for make in makes if getattr(make, "__self__", None) == lopt), lopt.optimizer)
    return Candidate(label or path.resolve().name, source, digest, make, phi, lopt.needs_factors)


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
