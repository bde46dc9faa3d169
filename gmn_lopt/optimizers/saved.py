"""Saving and loading learned optimizers: a directory with JSON and safetensors, nothing executable."""

import contextlib
import hashlib
import inspect
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import optax
from jaxtyping import PyTree

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer, LearningRate, Scalar
from gmn_lopt.optimizers.leaves import Mask, tied_leaves
from gmn_lopt.optimizers.recipes import Recipe
from gmn_lopt.util.checks import settings_of_steps
from gmn_lopt.util.codec import from_json
from gmn_lopt.util.errors import FileError, OneLine, first_line
from gmn_lopt.util.sealed import (
    CONFIG_FILE,
    Kind,
    Sealed,
    fitting,
    is_there,
    named_arrays,
    read_architecture,
    read_sealed,
    write_sealed,
)

WEIGHTS_FILE = "phi.safetensors"
SHIPPED = "pretrained"
MOST_AXES = 64
SAVED_BEFORE = "it was saved by gmn_lopt 0.1: load it there, or meta-train it again with this version's recipes"
KIND = Kind("a learned optimizer", "optimizer", Recipe, 2, WEIGHTS_FILE, ("leaves",), {1: SAVED_BEFORE})


class SerializationError(OneLine, ValueError):
    """A saved learned optimizer cannot be written, or cannot be read back.

    Example:
        >>> structure = gmn_lopt.analyze(lambda p, x: jnp.mean(x @ p), jnp.ones((2, 1)), jnp.ones((3, 2)))
        >>> try:
        ...     gmn_lopt.load("nowhere", structure)
        ... except SerializationError:
        ...     print("no such optimizer")
        no such optimizer
    """


def save(path: str | os.PathLike[str], lopt: LearnedOptimizer, phi: PyTree) -> None:
    """Save a learned optimizer as a directory: ``config.json`` (architecture) and ``phi.safetensors`` (weights).

    The directory is written under another name and then renamed, so that a reader never sees half of it and a failure
    leaves what was saved before. The structure is not saved: the optimizer can be loaded for any other model. Only
    ``UNF`` belongs to the leaves of one model, so which spaces they have is saved with it.

    Args:
        path: the directory; one that holds a saved optimizer is replaced.
        lopt: the learned optimizer.
        phi: its meta-parameters.

    Raises:
        SerializationError: if ``path`` exists and is not a saved optimizer, cannot be written, or ``phi`` is not the
            optimizer's, or not finite.

    Example:
        >>> structure = gmn_lopt.analyze(lambda p, x: jnp.mean(x @ p), jnp.ones((2, 1)), jnp.ones((3, 2)))
        >>> lopt = gmn_lopt.recipe("sgdm", structure)
        >>> gmn_lopt.save("my-optimizer", lopt, lopt.init(jax.random.key(0)))
    """
    entries: dict[str, Any] = {}
    if _is_tied(lopt):
        leaves = zip(lopt.structure.parameters, tied_leaves(lopt.structure))
        entries["leaves"] = [{"name": p.name, "spaces": list(spaces)} for p, spaces in leaves]
    with _refusing("", FileError):
        write_sealed(Path(path), KIND, Recipe.of(lopt), phi, lopt.template(), **entries)


def load(
    path: str | os.PathLike[str],
    structure: GradientStructure,
    *,
    learning_rate: LearningRate | None = None,
    weight_decay: Scalar | None = None,
    total_steps: int | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Load a saved learned optimizer as an optax transformation for the model with this structure.

    Args:
        path: a directory that :func:`save` wrote, or the name of an optimizer that ships with the package
            (:func:`gmn_lopt.list_pretrained`).
        structure: the structure of the model to train, from :func:`gmn_lopt.analyze`; not necessarily that of the
            model on which the optimizer was meta-trained.
        learning_rate: a number or an optax schedule, in place of the optimizer's own step sizes.
        weight_decay: decoupled, as AdamW's.
        total_steps: the number of steps that there will be.
        mask: which parameters have weight decay, as in ``optax.adamw``. All four are those of
            :meth:`LearnedOptimizer.optimizer`.

    Returns:
        The transformation.

    Raises:
        SerializationError: in one line, if there is no such optimizer, its files are damaged or of another version, or
            a setting is refused; or if it is an ``unf`` that was trained on a model with other leaves
            or spaces (widths may differ).

    Example:
        >>> loss = lambda params, x: jnp.mean((jnp.tanh(x @ params["w"]) - 1.0) ** 2)
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
        >>> tx = gmn_lopt.load("default", gmn_lopt.analyze(loss, params, x), total_steps=1000)
        >>> value, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, x)
        >>> updates, state = tx.update(grads, tx.init(params), params, factors=factors)
    """
    lopt, phi = load_learned(path, structure)
    settings = {"learning_rate": learning_rate, "weight_decay": weight_decay, "total_steps": total_steps}
    return make_optimizer(lopt, phi, settings, str(path), mask)


def make_optimizer(
    lopt: LearnedOptimizer, phi: PyTree, settings: Mapping[str, Any], what: str, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Call ``lopt.optimizer`` with the settings that its user chose for ``what``, the optimizer's name in errors.

    A mask, which belongs to one model, is none of the settings that are written as text.

    Raises:
        SerializationError: in one line, if there is no such setting, or its value is refused.
    """
    taken = [name for name in list(inspect.signature(lopt.optimizer).parameters)[1:] if name != "mask"]
    if unknown := [name for name in settings if name not in taken]:
        raise SerializationError(f"{what} does not take {', '.join(unknown)}: it takes {', '.join(taken)}")
    with _refusing(f"{what}:", TypeError, ValueError):
        settings_of_steps(settings)
        optimizer = lopt.optimizer(phi, **settings, mask=mask)
    return optimizer


def load_learned(path: str | os.PathLike[str], structure: GradientStructure) -> tuple[LearnedOptimizer, PyTree]:
    """Load a saved learned optimizer and its meta-parameters; otherwise like :func:`load`."""
    return build_learned(read_saved(path), structure)


def read_saved(path: str | os.PathLike[str]) -> Sealed:
    """Read the files of a saved learned optimizer, at once; raises like :func:`load`."""
    with _refusing("", FileError):
        return read_sealed(_find(path), KIND)


def build_learned(saved: Sealed, structure: GradientStructure) -> tuple[LearnedOptimizer, PyTree]:
    """The learned optimizer in files that were read, and its meta-parameters; raises like :func:`load`."""
    lopt = saved.architecture.build(structure)
    if _is_tied(lopt):
        file = saved.path / CONFIG_FILE
        _check_leaves(_leaves(saved.config, file), lopt, file)
    with _refusing("", FileError):
        return lopt, fitting(saved.arrays, lopt.template(), str(saved.path / WEIGHTS_FILE))


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe of a saved learned optimizer; otherwise like :func:`load`.

    Example:
        >>> load_recipe("default").residual is None
        True
    """
    with _refusing("", FileError):
        recipe: Recipe = read_architecture(_find(path), KIND)[1]
    return recipe


def load_spaces(path: str | os.PathLike[str]) -> list[tuple[int, ...]] | None:
    """Of a saved optimizer that belongs to one model, the spaces of its leaves; of another None; raises like `load`."""
    directory = _find(path)
    with _refusing("", FileError):
        config, _ = read_architecture(directory, KIND)
    return [spaces for _, spaces in _leaves(config, directory / CONFIG_FILE)] if "leaves" in config else None


def shipped_names() -> tuple[str, ...]:
    """The names of the learned optimizers that ship with the package."""
    root = resources.files("gmn_lopt") / SHIPPED
    if not root.is_dir():
        return ()
    # A hidden directory is one that is being written.
    return tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def digest(phi: PyTree) -> str:
    """A digest of meta-parameters: equal for equal names, types and values, wherever they were saved."""
    found = hashlib.sha256()
    for name, leaf in sorted(named_arrays(phi).items()):
        array = np.asarray(leaf)
        found.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return found.hexdigest()[:16]


def _is_tied(lopt: LearnedOptimizer) -> bool:
    """Whether the meta-parameters belong to the leaves of one model."""
    return lopt.residual is not None and lopt.residual.network.tied


@contextlib.contextmanager
def _refusing(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Make errors of these classes one line that begins with ``what``."""
    try:
        yield
    except errors as error:
        raise SerializationError(f"{what} {first_line(error)}".strip()) from error


def _leaves(config: Mapping[str, Any], file: Path) -> list[tuple[str, tuple[int, ...]]]:
    """The names and the spaces of the leaves that a tied optimizer was saved with."""
    found = config.get("leaves")
    with _refusing(f'{file}: "leaves" is missing or damaged, which UNF needs:', ValueError, KeyError, TypeError):
        named = [(leaf["name"], from_json(leaf["spaces"], tuple[int, ...], "spaces")) for leaf in found or ()]
        if any(
            type(name) is not str or len(spaces) > MOST_AXES or max(spaces, default=0) > 10**6 for name, spaces in named
        ):
            raise ValueError("a name or a space is impossible")
    return named


def _check_leaves(there: Sequence[tuple[str, tuple[int, ...]]], lopt: LearnedOptimizer, file: Path) -> None:
    """Raise an error unless the model has the leaves, over the same spaces, that the optimizer was saved with."""
    here = [(p.name, spaces) for p, spaces in zip(lopt.structure.parameters, tied_leaves(lopt.structure))]
    if [spaces for _, spaces in there] == [spaces for _, spaces in here]:
        return
    different = (i for i, (a, b) in enumerate(itertools.zip_longest(there, here)) if not (a and b and a[1] == b[1]))
    first = next(different)
    leaf, other = (
        f"{leaves[first][0]} over spaces {leaves[first][1]}" if first < len(leaves) else "missing"
        for leaves in (there, here)
    )
    raise SerializationError(
        f"{file}: UNF belongs to the model that it was trained on, of which only widths may change; leaf "
        f"{first} was {leaf} there and is {other} in this model: meta-train it on this model, or use a "
        "PointwiseMLP, which fits any"
    )


def _find(path: str | os.PathLike[str]) -> Path:
    """The directory of a saved optimizer, or of one that ships with the package."""
    there = is_there(path)
    if not os.path.lexists(path) and not there:  # lexists is False, too, for what no file system takes as a name
        names = shipped_names()
        if str(path) in names:
            return Path(str(resources.files("gmn_lopt") / SHIPPED / str(path)))
        ships = f"are {', '.join(names)}" if names else "do not exist in this version"
        raise SerializationError(f"{path} is neither a directory nor a shipped optimizer (those {ships})")
    if not there:
        raise SerializationError(f"{path} is not a directory: give the one that gmn_lopt.save wrote")
    return Path(path)
