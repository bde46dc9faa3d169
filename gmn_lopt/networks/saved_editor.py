"""Saving and loading editors: a directory with JSON and safetensors, nothing executable.

:func:`gmn_lopt.load` returns an optimizer for any model, as an optax transformation; an editor is none. It takes no
steps, needs to know how the network is computed and what its edited image holds, may answer with several networks, and
belongs to networks of one architecture. So :func:`load_editor` reads its files, which are of the same kind.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import ArrayLike, Float, PyTree

from gmn_lopt.factors.names import leaf_name
from gmn_lopt.networks.editor import Editor, EditorModule, Forward
from gmn_lopt.util.codec import from_json, to_json
from gmn_lopt.util.directories import write_directory
from gmn_lopt.util.errors import FileError, OneLine, first_line
from gmn_lopt.util.files import read_json, read_regular

FORMAT, VERSION = "gmn_lopt editor", 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "weights.safetensors"
LARGEST_CONFIG, LARGEST_WEIGHTS = 2**20, 2**30  # bytes
ENTRIES = ("format", "version", "editor", "leaves", "outputs", "checksum")


class EditorError(OneLine, ValueError):
    """A saved editor cannot be written or read back, or does not fit a network or an image.

    Example:
        >>> try:
        ...     load_editor("nowhere", lambda params, points: (points,), {})
        ... except EditorError as error:
        ...     print(error)
        nowhere/config.json is missing
    """


@dataclass(frozen=True)
class LoadedEditor:
    """An editor that was loaded: call it with a network's parameters and the known values of its edited image.

    Attributes:
        module, weights: the flax module and its parameters.
        outputs: how many values a point of an image has.
    """

    module: EditorModule
    weights: PyTree
    outputs: int

    @property
    def points(self) -> Float[np.ndarray, "points inputs"]:
        """Where the edited image has to be known, as the network's coordinates."""
        return np.asarray(self.module.config.points, np.float32)

    def __call__(self, params: PyTree, values: ArrayLike) -> PyTree:
        """Change a network's parameters.

        Args:
            params: those of the network.
            values: what its edited image holds at :attr:`points`, ``[points, outputs]``.

        Returns:
            The changed parameters, with one more axis in front: the heads, whose values are to be averaged
            (:func:`gmn_lopt.networks.editor.shown`).

        Raises:
            EditorError: the network has another architecture, or there are other values than the points have.
        """
        _check_leaves(_described(params), _described_structure(self.module), "the editor")
        if np.shape(values) != (len(self.points), self.outputs):
            raise EditorError(
                f"the values must be those of {len(self.points)} points, {self.outputs} each, not of shape "
                f"{np.shape(values)}"
            )
        return self._apply(params, jnp.asarray(values))

    @cached_property
    def _apply(self) -> Any:
        return jax.jit(lambda params, values: self.module.apply({"params": self.weights}, params, values))


def save_editor(
    path: str | os.PathLike[str], editor: Editor, forward: Forward, params: PyTree, weights: PyTree
) -> None:
    """Save an editor as a directory: ``config.json`` and ``weights.safetensors``.

    Args:
        path: the directory; one that holds a saved editor is replaced.
        editor: the architecture.
        forward: how the networks are computed that it edits.
        params: the parameters of one of them, or their shapes.
        weights: the editor's own.

    Raises:
        EditorError: it cannot be written, ``path`` holds something else, or the weights are not finite.

    Example:
        >>> from gmn_lopt.networks.graph import GraphNetwork
        >>> forward = lambda p, x: (x @ p["w"] + p["b"],)
        >>> params = {"b": jnp.ones(3), "w": jnp.ones((2, 3))}
        >>> editor = Editor(GraphNetwork(4, 1), points=((0.0, 0.0),))
        >>> weights = editor.module(forward, params).init(jax.random.key(0), params, jnp.ones((1, 3)))["params"]
        >>> save_editor("my-editor", editor, forward, params, weights)
        >>> edited = load_editor("my-editor", forward, params)(params, jnp.ones((1, 3)))
        >>> edited["w"].shape
        (1, 2, 3)
    """
    path = Path(path)
    if path.exists() and not (path / CONFIG_FILE).is_file():
        raise EditorError(f"cannot save {path}: it exists and is not a saved editor; choose another path")
    arrays = {name: np.asarray(x) for name, x in _named(weights).items()}
    _check_finite(arrays, f"cannot save {path}: the editor")
    content = safetensors.numpy.save(arrays)
    outputs = _outputs(editor, forward, params)
    config: dict[str, Any] = {"format": FORMAT, "version": VERSION, "editor": to_json(editor), "outputs": outputs}
    config["leaves"] = [[name, list(shape)] for name, shape in _described(params)]
    config["checksum"] = _checksum(config, content)
    try:
        write_directory(path, {WEIGHTS_FILE: content, CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode()})
    except OSError as error:
        raise EditorError(f"cannot save {path}: {error.strerror or error}") from error


def load_editor(path: str | os.PathLike[str], forward: Forward, params: PyTree) -> LoadedEditor:
    """Load a saved editor for networks like this one.

    Args:
        path: a directory that :func:`save_editor` wrote.
        forward: ``forward(params, points)``, the values of each layer of the network, those of the image last.
        params: the parameters of a network that is to be edited, or their shapes.

    Raises:
        EditorError: in one line, if there is no such editor, its files are damaged or of another version, or it was
            trained on networks of another architecture.

    Example:
        >>> try:
        ...     load_editor("nowhere", lambda p, x: (x @ p["w"],), {"w": jnp.ones((2, 3))})
        ... except EditorError:
        ...     print("no such editor")
        no such editor
    """
    file, weights_file = Path(path) / CONFIG_FILE, Path(path) / WEIGHTS_FILE
    try:
        config = read_json(file, LARGEST_CONFIG)
        if config.get("format") != FORMAT:
            raise EditorError(f"{file} does not describe an editor of gmn_lopt")
        if type(config.get("version")) is not int or config["version"] != VERSION:
            raise EditorError(f"{file} is of another version than {VERSION}: install the gmn_lopt that wrote it")
        content = read_regular(weights_file, LARGEST_WEIGHTS)
    except FileError as error:
        raise EditorError(str(error)) from None
    if sorted(config) != sorted(ENTRIES):
        raise EditorError(f"{file} has the entries {', '.join(sorted(config))}, not {', '.join(sorted(ENTRIES))}")
    if config.pop("checksum") != _checksum(config, content):
        raise EditorError(f"{path} is damaged: {CONFIG_FILE} and {WEIGHTS_FILE} are not what was saved")
    try:
        arrays = safetensors.numpy.load(content)
        editor = from_json(config["editor"], Editor, "editor")
        there = [(str(name), tuple(map(int, shape))) for name, shape in config["leaves"]]
        _check_leaves(_described(params), there, str(file))
        module = editor.module(forward, params)
        outputs = _outputs(editor, forward, params)
    except EditorError:
        raise
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise EditorError(f"{path}: {first_line(error)}") from error
    if outputs != config["outputs"]:
        raise EditorError(f"{file}: it edits networks with {config['outputs']} outputs, this one has {outputs}")
    shapes = jax.ShapeDtypeStruct((len(editor.points), outputs), jnp.float32)
    template = jax.eval_shape(module.init, jax.random.key(0), params, shapes)["params"]
    expected = {name: (x.shape, str(x.dtype)) for name, x in _named(template).items()}
    if {name: (x.shape, str(x.dtype)) for name, x in arrays.items()} != expected:
        raise EditorError(f"{weights_file} does not hold the weights of the architecture in {CONFIG_FILE}")
    _check_finite(arrays, str(weights_file))
    leaves = [jnp.asarray(arrays[name]) for name in _named(template)]
    return LoadedEditor(module, jax.tree.unflatten(jax.tree.structure(template), leaves), outputs)


def _outputs(editor: Editor, forward: Forward, params: PyTree) -> int:
    points = jax.ShapeDtypeStruct((len(editor.points), len(editor.points[0])), jnp.float32)
    return int(jax.eval_shape(forward, params, points)[-1].shape[-1])


def _described(params: PyTree) -> list[tuple[str, tuple[int, ...]]]:
    return [(leaf_name(path), tuple(jnp.shape(x))) for path, x in jax.tree_util.tree_leaves_with_path(params)]


def _described_structure(module: EditorModule) -> list[tuple[str, tuple[int, ...]]]:
    return [(leaf.name, tuple(leaf.shape)) for leaf in module.structure.parameters]


def _check_leaves(here: list[tuple[str, tuple[int, ...]]], there: list[tuple[str, tuple[int, ...]]], what: str) -> None:
    """Raise an error unless a network has the parameters of those that an editor was trained on."""
    if here != there:
        words = (", ".join(f"{name} {list(shape)}" for name, shape in leaves) for leaves in (there, here))
        raise EditorError(f"{what} edits networks with the parameters {next(words)}; this one has {next(words)}")


def _named(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_finite(arrays: Mapping[str, np.ndarray], what: str) -> None:
    for name, array in sorted(arrays.items()):
        if not np.isfinite(array).all():
            raise EditorError(f"{what} holds {name} with values that are not finite")


def _checksum(config: Mapping[str, Any], weights: bytes) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode() + weights).hexdigest()
