"""Saving and loading editors: a directory with JSON and safetensors, nothing executable.

:func:`gmn_lopt.load` returns an optimizer for any model, as an optax transformation; an editor is none. It takes no
steps, needs to know how the network is computed and what its edited image holds, may answer with several networks, and
belongs to networks of one architecture. So :func:`load_editor` reads its files, which are of the same kind.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, PyTree

from gmn_lopt.factors.names import leaf_name
from gmn_lopt.networks.editor import Editor, EditorModule, Forward
from gmn_lopt.util.errors import FileError, OneLine, first_line
from gmn_lopt.util.sealed import CONFIG_FILE, Kind, fitting, read_sealed, write_sealed

WEIGHTS_FILE = "weights.safetensors"
KIND = Kind("an editor", "editor", Editor, 1, WEIGHTS_FILE, ("leaves", "outputs"))


class EditorError(OneLine, ValueError):
    """A saved editor cannot be written or read back, or does not fit a network or an image.

    Example:
        >>> try:
        ...     load_editor("nowhere", lambda params, points: (points,), {})
        ... except EditorError as error:
        ...     print(error)
        nowhere is missing
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
    leaves = [[name, list(shape)] for name, shape in _described(params)]
    outputs = _outputs(editor, forward, params)
    template = _template(editor, editor.module(forward, params), params, outputs)
    try:
        write_sealed(Path(path), KIND, editor, weights, template, leaves=leaves, outputs=outputs)
    except FileError as error:
        raise EditorError(str(error)) from error


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
    path, what = Path(path), Path(path) / CONFIG_FILE
    try:
        saved = read_sealed(path, KIND)
        editor, there = saved.architecture, [(name, tuple(shape)) for name, shape in saved.config.get("leaves") or ()]
        _check_leaves(_described(params), there, str(what))
        module, outputs = editor.module(forward, params), _outputs(editor, forward, params)
        if outputs != saved.config.get("outputs"):
            raise EditorError(f"{what}: it edits networks with other outputs than the {outputs} of this one")
        weights = fitting(saved.arrays, _template(editor, module, params, outputs), str(path / WEIGHTS_FILE))
    except FileError as error:
        raise EditorError(str(error)) from None
    except EditorError:
        raise
    except (ValueError, TypeError) as error:
        raise EditorError(f"{path}: {first_line(error)}") from error
    return LoadedEditor(module, weights, outputs)


def _template(editor: Editor, module: EditorModule, params: PyTree, outputs: int) -> PyTree:
    """Shapes of the weights."""
    values = jax.ShapeDtypeStruct((len(editor.points), outputs), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), params, values)["params"]


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
