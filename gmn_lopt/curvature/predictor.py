"""A network that predicts the diagonal of the Fisher matrix from the gradients of a few examples, and its files.

:func:`gmn_lopt.load` returns an optimizer, whatever it is given; a predictor is none, so :func:`load_predictor` reads
its files, which are of the same kind: JSON and safetensors, nothing executable.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gmn_lopt.curvature.standardization import fit_standardization, standardize
from gmn_lopt.factors import Factors, GradientStructure
from gmn_lopt.networks import GradMetaNetConfig, GradMetaNetPlusPlusConfig, init_gradmetanet
from gmn_lopt.util.errors import FileError
from gmn_lopt.util.sealed import Kind, fitting, read_sealed, write_sealed

WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True)
class FisherPredictor:
    """GradMetaNet or GradMetaNet++ as an estimator of the Fisher diagonal (arXiv:2507.01649, section 7.1).

    It reads the factors of a few examples and has one output for each parameter entry, in units of the target: its
    mean and deviation over a training set.

    Attributes:
        network: the architecture; its ``out_features`` do not matter, there is one.
        residual: whether the output is added to the standard estimator, the mean over the examples that are read. The
            paper's is not.

    Example:
        >>> loss = lambda params, x: jnp.sum(jnp.sin(x @ params["w"]))
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
        >>> structure = gmn_lopt.analyze(loss, params, x)
        >>> _, _, factors = gmn_lopt.value_grad_and_factors(loss)(params, x)
        >>> several = jax.tree.map(lambda x: x[None], factors)  # of one network
        >>> predictor = FisherPredictor(GradMetaNetConfig(width=8))
        >>> weights = predictor.init(jax.random.key(0), structure, several, {"w": jnp.arange(6.0).reshape(1, 2, 3)})
        >>> predictor.predict(structure, weights, factors)["w"].shape
        (2, 3)
    """

    network: GradMetaNetConfig | GradMetaNetPlusPlusConfig
    residual: bool = False

    def module(self, structure: GradientStructure) -> nn.Module:
        """The network, for one model."""
        return replace(self.network, out_features=1).module(structure).clone(normalize=False)

    def init(self, key: jax.Array, structure: GradientStructure, factors: Factors, targets: PyTree) -> dict[str, Any]:
        """Draw weights, and fit the standardisation.

        Args:
            key: a random key.
            structure: the structure of the model.
            factors: those of a training set, ``[networks, S, d]``, tangents at per-element scale.
            targets: its diagonals, a tree like the parameters with arrays ``[networks, ...]``.

        Returns:
            The weights: ``network``, and the statistics ``input`` and ``target``.
        """
        flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(targets)])
        statistics = fit_standardization((factors.activations, factors.tangents))
        network = init_gradmetanet(self.module(structure), key)
        return {"network": network, "input": statistics, "target": fit_standardization(flat)}

    def standardized(self, structure: GradientStructure, weights: dict[str, Any], factors: Factors) -> list[jax.Array]:
        """What is trained: the diagonal of each leaf in units of the target, of the factors of one network."""
        of = weights["input"]
        statistics = {name: replace(factors, activations=of[name][0], tangents=of[name][1]) for name in of}
        read = jax.tree.map(lambda x: x[None], standardize(statistics, factors))  # one channel
        outputs: Any = self.module(structure).apply({"params": weights["network"]}, read)
        shapes = [p.shape for p in structure.parameters]
        found = [jnp.zeros(shape) if y is None else y[..., 0] for y, shape in zip(outputs, shapes)]
        if self.residual:
            target = weights["target"]
            means = standard_estimate(structure, factors)
            found = [y + (x - target["mean"]) / target["deviation"] for y, x in zip(found, means)]
        return found

    def predict(self, structure: GradientStructure, weights: dict[str, Any], factors: Factors) -> PyTree:
        """The diagonal, a tree like the parameters, from the factors ``[S, d]`` at per-element scale."""
        found = self.standardized(structure, weights, factors)
        target = weights["target"]
        return jax.tree.unflatten(structure.treedef, [y * target["deviation"] + target["mean"] for y in found])


BEFORE = "its configuration had no checksum: train it again"
KIND = Kind("a Fisher predictor", "predictor", FisherPredictor, 2, WEIGHTS_FILE, before={1: BEFORE})


def standard_estimate(structure: GradientStructure, factors: Factors) -> list[jax.Array]:
    """The mean over the set of the squared gradients, for models whose set are examples: of each leaf."""
    squared = jax.tree.map(jnp.square, factors)
    size = len(factors.tangents[0])
    return [x / size for x in jax.tree.leaves(structure.reconstruct(squared))]


def save_predictor(
    path: str | os.PathLike[str], predictor: FisherPredictor, structure: GradientStructure, weights: dict[str, Any]
) -> None:
    """Save a predictor as a directory: ``config.json`` and ``weights.safetensors``.

    Args:
        path: the directory; one that holds a saved predictor is replaced.
        predictor: the predictor.
        structure: that of the model whose factors it was trained on; the statistics are those of its layers.
        weights: its weights.

    Raises:
        FileError: in one line, if ``path`` is something else, or cannot be written.

    Example:
        >>> loss = lambda params, x: jnp.sum(jnp.sin(x @ params["w"]))
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
        >>> structure = gmn_lopt.analyze(loss, params, x)
        >>> several = jax.tree.map(lambda x: x[None], gmn_lopt.value_grad_and_factors(loss)(params, x)[2])
        >>> predictor = FisherPredictor(GradMetaNetConfig(width=8))
        >>> weights = predictor.init(jax.random.key(0), structure, several, {"w": jnp.arange(6.0).reshape(1, 2, 3)})
        >>> gmn_lopt.save_predictor("my-predictor", predictor, structure, weights)
    """
    write_sealed(Path(path), KIND, predictor, weights, _template(predictor, structure))


def load_predictor(path: str | os.PathLike[str], structure: GradientStructure) -> Callable[[Factors], PyTree]:
    """Load a saved predictor for the model with this structure.

    Args:
        path: a directory that :func:`save_predictor` wrote.
        structure: the structure of the model, from :func:`gmn_lopt.analyze`; widths and the number of examples may be
            others than in training, layers not.

    Returns:
        ``factors -> diagonal``, a tree like the parameters; factors of :func:`gmn_lopt.value_grad_and_factors` with a
        loss that is a *sum* over the examples, so that they are at per-element scale.

    Raises:
        FileError: in one line, if there is no such predictor, its files are damaged or of another version, or it was
            trained on a model with other layers.

    Example:
        >>> loss = lambda params, x: jnp.sum(jnp.sin(x @ params["w"]))
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
        >>> structure = gmn_lopt.analyze(loss, params, x)
        >>> _, _, factors = gmn_lopt.value_grad_and_factors(loss)(params, x)
        >>> predictor = gmn_lopt.FisherPredictor(gmn_lopt.GradMetaNetConfig(width=8))
        >>> several = jax.tree.map(lambda x: x[None], factors)
        >>> weights = predictor.init(jax.random.key(0), structure, several, {"w": jnp.arange(6.0).reshape(1, 2, 3)})
        >>> gmn_lopt.save_predictor("my-predictor", predictor, structure, weights)
        >>> gmn_lopt.load_predictor("my-predictor", structure)(factors)["w"].shape
        (2, 3)
    """
    saved = read_sealed(Path(path), KIND)
    predictor: FisherPredictor = saved.architecture
    try:
        weights = fitting(saved.arrays, _template(predictor, structure), str(Path(path) / WEIGHTS_FILE))
    except FileError as error:
        raise FileError(f"{error}: it belongs to a model of other layers") from None
    return lambda factors: predictor.predict(structure, weights, factors)


def _template(predictor: FisherPredictor, structure: GradientStructure) -> dict[str, Any]:
    """Shapes of the weights."""
    shapes = tuple(
        tuple(jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in of)
        for of in (structure.activation_shapes, structure.tangent_shapes)
    )
    targets = [jax.ShapeDtypeStruct((1, *p.shape), jnp.float32) for p in structure.parameters]
    found: dict[str, Any] = jax.eval_shape(
        lambda key, a, g, y: predictor.init(key, structure, Factors(a, g), y), jax.random.key(0), *shapes, targets
    )
    return found
