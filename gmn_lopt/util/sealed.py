"""Directories of a JSON configuration and weights, with one checksum: nothing executable, and nothing damaged.

Learned optimizers, editors and predictors are saved as such. Nothing is built before the checksum says that both files
are as they were saved, and what comes with a checksum of its own cannot ask for more than it brings.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from gmn_lopt.util.checks import shown
from gmn_lopt.util.codec import from_json, to_json
from gmn_lopt.util.directories import read_directory, stepped_aside, write_directory
from gmn_lopt.util.errors import FileError, first_line, reason_of
from gmn_lopt.util.files import parse_object

CONFIG_FILE = "config.json"
LARGEST_CONFIG = 2**20  # bytes
LARGEST_WEIGHTS = 2**26  # bytes; more would take more than a second to check
LAYERS = ("layers", "hidden_layers", "set_layers", "neuron_layers", "blocks")
DAMAGED = (safetensors.SafetensorError, KeyError, ValueError, OverflowError)  # what reading damaged weights raises


@dataclass(frozen=True)
class Kind:
    """What is saved.

    Attributes:
        name: in errors, such as "a learned optimizer".
        part: the entry of the configuration that has the architecture.
        architecture: the frozen dataclass of it; what is imported may subclass its parts.
        version: of the whole format; another one is refused.
        weights_file: the name of the file with the weights.
        entries: what the configuration may hold beside.
        before: what can be done with earlier versions.
    """

    name: str
    part: str
    architecture: type
    version: int
    weights_file: str
    entries: tuple[str, ...] = ()
    before: Mapping[int, str] = field(default_factory=dict)

    @property
    def format(self) -> str:
        """What ``config.json`` says that it is."""
        return "gmn_lopt " + self.name.partition(" ")[2]


@dataclass(frozen=True)
class Sealed:
    """What was read from a directory: the configuration, the architecture in it, the weights by name, the files."""

    path: Path
    config: dict[str, Any]
    architecture: Any
    arrays: dict[str, np.ndarray]
    contents: dict[str, bytes]


def write_sealed(path: Path, kind: Kind, architecture: Any, weights: PyTree, template: PyTree, **entries: Any) -> None:
    """Save an architecture and its weights, in place of another of its kind, so that a reader never sees half of it.

    Raises:
        FileError: ``path`` is something else, it cannot be written, or the weights are not like the template, not
            finite, or too many.
    """
    if holds_other(path):
        thing = kind.name.rpartition(" ")[2]
        raise FileError(f"cannot save {path}: it exists and is not a saved {thing}; choose another path")
    arrays = {name: np.asarray(x) for name, x in named_arrays(weights).items()}
    what = f"cannot save {path}: {kind.weights_file.partition('.')[0]}"
    _check_fit(arrays, template, what)
    _check_finite(arrays, what)
    content = safetensors.numpy.save(arrays)
    if len(content) > LARGEST_WEIGHTS:
        raise FileError(f"cannot save {path}: {len(content)} bytes of weights, more than {LARGEST_WEIGHTS}")
    config = {"format": kind.format, "version": kind.version, kind.part: to_json(architecture), **entries}
    config["checksum"] = checksum(config, content)
    files = {kind.weights_file: content, CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode()}
    try:
        write_directory(path, files)
    except (OSError, ValueError) as error:  # ValueError: no file system takes the name
        raise FileError(f"cannot save {path}: {reason_of(error)}") from error


def read_sealed(path: Path, kind: Kind) -> Sealed:
    """Read what :func:`write_sealed` wrote.

    Raises:
        FileError: in one line that names the file, it is missing, damaged, of another version, or something else.
    """
    largest = {CONFIG_FILE: LARGEST_CONFIG, kind.weights_file: LARGEST_WEIGHTS}
    contents = read_directory(path, largest)
    config = _parse(contents[CONFIG_FILE], path / CONFIG_FILE, kind)
    architecture = _architecture(config, path / CONFIG_FILE, kind)
    weights = path / kind.weights_file
    arrays = _parse_arrays(contents[kind.weights_file], weights)
    if config.get("checksum") != checksum(config, contents[kind.weights_file]):
        raise FileError(f"{path} is damaged: {CONFIG_FILE} and {kind.weights_file} are not what was saved")
    if (layers := _layers(config[kind.part])) > len(arrays):
        raise FileError(f"{weights} holds {len(arrays)} arrays, too few for {layers} layers in {CONFIG_FILE}")
    _check_finite(arrays, str(weights))
    return Sealed(path, config, architecture, arrays, contents)


def read_architecture(path: Path, kind: Kind) -> tuple[dict[str, Any], Any]:
    """The configuration and the architecture in it, without the weights; raises like :func:`read_sealed`."""
    file = path / CONFIG_FILE
    config = _parse(read_directory(path, {CONFIG_FILE: LARGEST_CONFIG})[CONFIG_FILE], file, kind)
    return config, _architecture(config, file, kind)


def holds_other(path: Path) -> bool:
    """Whether there is something at a path that nothing saved may replace."""
    return os.path.lexists(path) and not os.path.isfile(path / CONFIG_FILE)


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether there is a directory, if it is not just being replaced."""
    return os.path.isdir(path) or stepped_aside(Path(path)) is not None


def checksum(config: Mapping[str, Any], weights: bytes) -> str:
    """That of the configuration, but for its own entry, and of the weights."""
    rest = {name: x for name, x in config.items() if name != "checksum"}
    found = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    found.update(weights)
    return found.hexdigest()


def named_arrays(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by the names that they are saved under."""
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(tree)}


def fitting(arrays: Mapping[str, np.ndarray], template: PyTree, what: str) -> PyTree:
    """The arrays as a tree like the template, whose leaves have shapes and types.

    Raises:
        FileError: one is missing, unknown, or of another shape or type; the message begins with ``what``.
    """
    _check_fit(arrays, template, what)
    leaves = [jnp.asarray(arrays[name]) for name in named_arrays(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _check_finite(arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Raise a FileError that begins with ``what`` where an array has entries that are not finite."""
    for name, array in sorted(arrays.items()):
        if not np.isfinite(array).all():
            raise FileError(f"{what} holds {name} with values that are not finite")


def _check_fit(arrays: Mapping[str, np.ndarray], template: PyTree, what: str) -> None:
    expected = named_arrays(template)
    for name in expected:
        if name not in arrays:
            raise FileError(f"{what} lacks {name}, which the architecture in {CONFIG_FILE} needs")
    for name, array in sorted(arrays.items()):
        if name not in expected:
            raise FileError(f"{what} holds {name}, which the architecture in {CONFIG_FILE} does not have")
        if array.shape != expected[name].shape:
            raise FileError(
                f"{what} holds {name} with shape {array.shape}, but the architecture in {CONFIG_FILE} needs "
                f"{expected[name].shape}"
            )
        if array.dtype != expected[name].dtype:
            raise FileError(f"{what} holds {name} as {array.dtype}, not {expected[name].dtype}")


def _parse(content: bytes, file: Path, kind: Kind) -> dict[str, Any]:
    config = parse_object(content, file)
    if config.get("format") != kind.format:
        raise FileError(f"{file} does not describe {kind.name} of gmn_lopt")
    version = config.get("version")
    if type(version) is not int or version != kind.version:
        hint = kind.before.get(version) if type(version) is int else None
        hint = hint or "install the gmn_lopt that wrote it"
        raise FileError(
            f"{file} has format version {shown(version)}, this gmn_lopt reads version {kind.version}: {hint}"
        )
    if unknown := sorted(config.keys() - {"format", "version", "checksum", kind.part, *kind.entries}):
        raise FileError(f"{file} has the unknown entry {unknown[0]!r}")
    return config


def _architecture(config: Mapping[str, Any], file: Path, kind: Kind) -> Any:
    try:
        return from_json(config.get(kind.part), kind.architecture, kind.part)
    except ValueError as error:
        raise FileError(f"{file}: {first_line(error)}") from None


def _parse_arrays(content: bytes, file: Path) -> dict[str, np.ndarray]:
    try:
        arrays: dict[str, np.ndarray] = safetensors.numpy.load(content)
    except DAMAGED as error:
        raise FileError(f"{file} is damaged or not a safetensors file: {first_line(error)}") from None
    return arrays


def _layers(architecture: Any) -> int:
    """The number of layers that an architecture asks for, as JSON values; each has an array at least."""
    if not isinstance(architecture, dict):
        return 0
    return sum(x if name in LAYERS else _layers(x) for name, x in architecture.items())
