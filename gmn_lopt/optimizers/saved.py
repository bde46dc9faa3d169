"""Saving and loading learned optimizers: a directory with JSON and safetensors, nothing executable."""

import contextlib
import hashlib
import inspect
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer, LearningRate, Scalar
from gmn_lopt.optimizers.leaves import Mask, tied_leaves
from gmn_lopt.optimizers.recipes import Recipe
from gmn_lopt.util.checks import settings_of_steps
from gmn_lopt.util.codec import from_json, to_json
from gmn_lopt.util.directories import read_directory, stepped_aside, write_directory
from gmn_lopt.util.errors import FileError, OneLine, first_line
from gmn_lopt.util.files import parse_object

FORMAT = "gmn_lopt learned optimizer"
VERSION = 2
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "phi.safetensors"
SHIPPED = "pretrained"
LARGEST_CONFIG, LARGEST_WEIGHTS = 2**20, 2**26  # bytes; more weights would take more than a second to check
ENTRIES = {"format", "version", "optimizer", "leaves", "checksum"}
LAYERS = ("hidden_layers", "set_layers", "neuron_layers", "blocks")
MOST_AXES = 64
DAMAGED = (safetensors.SafetensorError, KeyError, ValueError, OverflowError)  # what reading damaged weights raises
SAVED_BEFORE = "it was saved by gmn_lopt 0.1: load it there, or meta-train it again with this version's recipes"


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
    path = Path(path)
    arrays = {name: np.asarray(array) for name, array in _named_arrays(phi).items()}
    _check_arrays(arrays, lopt, f"cannot save {path}: phi")
    weights = safetensors.numpy.save(arrays)
    if len(weights) > LARGEST_WEIGHTS:
        raise SerializationError(f"cannot save {path}: {len(weights)} bytes of weights, more than {LARGEST_WEIGHTS}")
    config: dict[str, Any] = {"format": FORMAT, "version": VERSION, "optimizer": to_json(Recipe.of(lopt))}
    if _is_tied(lopt):
        leaves = zip(lopt.structure.parameters, tied_leaves(lopt.structure))
        config["leaves"] = [{"name": p.name, "spaces": list(spaces)} for p, spaces in leaves]
    config["checksum"] = _checksum(config, weights)
    if path.exists() and not (path / CONFIG_FILE).is_file():
        raise SerializationError(f"cannot save {path}: it exists and is not a saved optimizer; choose another path")
    files = {WEIGHTS_FILE: weights, CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode()}
    try:
        write_directory(path, files)
    except OSError as error:
        raise SerializationError(f"cannot save {path}: {error.strerror or error}") from error


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
    """Load a saved learned optimizer and its meta-parameters; otherwise like :func:`load`.

    Nothing is built before the checksum says that both files are as they were saved, and the weights have as many
    arrays as the architecture has layers: what comes with a checksum of its own takes no long time either.
    """
    directory = _find(path)
    file, weights = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    with _refusing("", FileError):
        contents = read_directory(directory, {CONFIG_FILE: LARGEST_CONFIG, WEIGHTS_FILE: LARGEST_WEIGHTS})
    config, recipe = _parse_config(contents[CONFIG_FILE], file)
    content = contents.pop(WEIGHTS_FILE)
    with _refusing(f"{weights} is damaged or not a safetensors file:", *DAMAGED):
        arrays = safetensors.numpy.load(content)
    if config.pop("checksum", None) != _checksum(config, content):
        raise SerializationError(f"{directory} is damaged: {CONFIG_FILE} and {WEIGHTS_FILE} are not what was saved")
    if (layers := _layers(to_json(recipe))) > len(arrays):
        raise SerializationError(f"{weights} holds {len(arrays)} arrays, too few for {layers} layers in {CONFIG_FILE}")
    lopt = recipe.build(structure)
    if _is_tied(lopt):
        _check_leaves(_leaves(config, file), lopt, file)
    _check_arrays(arrays, lopt, str(weights))
    template = lopt.template()
    leaves = [jax.numpy.asarray(arrays[name]) for name in _named_arrays(template)]
    return lopt, jax.tree.unflatten(jax.tree.structure(template), leaves)


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe of a saved learned optimizer; otherwise like :func:`load`.

    Example:
        >>> load_recipe("default").residual is None
        True
    """
    return _read_config(path)[2]


def load_spaces(path: str | os.PathLike[str]) -> list[tuple[int, ...]] | None:
    """Of a saved optimizer that belongs to one model, the spaces of its leaves; of another None; raises like `load`."""
    file, config, _ = _read_config(path)
    return [spaces for _, spaces in _leaves(config, file)] if "leaves" in config else None


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
    for name, leaf in sorted(_named_arrays(phi).items()):
        array = np.asarray(leaf)
        found.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return found.hexdigest()[:16]


def _is_tied(lopt: LearnedOptimizer) -> bool:
    """Whether the meta-parameters belong to the leaves of one model."""
    return lopt.residual is not None and lopt.residual.network.tied


def _checksum(config: Mapping[str, Any], weights: bytes) -> str:
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    found.update(weights)
    return found.hexdigest()


def _layers(recipe: Any) -> int:
    """The number of layers that a recipe asks for, as JSON values; each has an array at least."""
    if not isinstance(recipe, dict):
        return 0
    return sum(x if name in LAYERS else _layers(x) for name, x in recipe.items())


def _named_arrays(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(tree)}


def _check_arrays(arrays: dict[str, np.ndarray], lopt: LearnedOptimizer, what: str) -> None:
    """Raise an error that begins with ``what`` where the arrays are not meta-parameters of the learned optimizer."""
    expected = _named_arrays(lopt.template())
    for name in expected:
        if name not in arrays:
            raise SerializationError(f"{what} lacks {name}, which the architecture in {CONFIG_FILE} needs")
    for name, array in sorted(arrays.items()):
        if name not in expected:
            raise SerializationError(f"{what} holds {name}, which the architecture in {CONFIG_FILE} does not have")
        if array.shape != expected[name].shape:
            raise SerializationError(
                f"{what} holds {name} with shape {array.shape}, but the architecture in {CONFIG_FILE} needs "
                f"{expected[name].shape}"
            )
        if array.dtype != expected[name].dtype:
            raise SerializationError(f"{what} holds {name} as {array.dtype}, not {expected[name].dtype}")
        if not np.isfinite(array).all():
            raise SerializationError(f"{what} holds {name} with values that are not finite")


@contextlib.contextmanager
def _refusing(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Make errors of these classes one line that begins with ``what``."""
    try:
        yield
    except errors as error:
        raise SerializationError(f"{what} {first_line(error)}".strip()) from error


def _read_config(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any], Recipe]:
    """Of a saved optimizer its configuration, the file that has it, and the recipe in it."""
    directory = _find(path)
    with _refusing("", FileError):
        content = read_directory(directory, {CONFIG_FILE: LARGEST_CONFIG})[CONFIG_FILE]
    return directory / CONFIG_FILE, *_parse_config(content, directory / CONFIG_FILE)


def _parse_config(content: bytes, file: Path) -> tuple[dict[str, Any], Recipe]:
    with _refusing("", FileError):
        config = parse_object(content, file)
    if config.get("format") != FORMAT:
        raise SerializationError(f"{file} does not describe a learned optimizer of gmn_lopt")
    version = config.get("version")
    if type(version) is not int or version != VERSION:
        hint = SAVED_BEFORE if version == 1 else "install the gmn_lopt that wrote it"
        found = ascii(version)[:20]
        raise SerializationError(f"{file} has format version {found}, this gmn_lopt reads version {VERSION}: {hint}")
    if unknown := sorted(config.keys() - ENTRIES):
        raise SerializationError(f"{file} has the unknown entry {unknown[0]!r}")
    with _refusing(f"{file}:", ValueError):
        recipe = from_json(config.get("optimizer"), Recipe, "optimizer")
    return config, recipe


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
    replaced = stepped_aside(Path(path)) is not None
    if not os.path.lexists(path) and not replaced:  # lexists is False, too, for what no file system takes as a name
        names = shipped_names()
        if str(path) in names:
            return Path(str(resources.files("gmn_lopt") / SHIPPED / str(path)))
        ships = f"are {', '.join(names)}" if names else "do not exist in this version"
        raise SerializationError(f"{path} is neither a directory nor a shipped optimizer (those {ships})")
    if not os.path.isdir(path) and not replaced:
        raise SerializationError(f"{path} is not a directory: give the one that gmn_lopt.save wrote")
    return Path(path)
