"""What an optimizer does with each parameter of a model, for people to read."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gmn_lopt.factors.structure import GradientStructure, list_alike
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.optimizers.saved import load_learned


def explain(structure: GradientStructure, optimizer: str | LearnedOptimizer = "default") -> str:
    """Tell what an optimizer does with each parameter of a model, and how large its state is.

    Args:
        structure: of the model, from :func:`gmn_lopt.analyze`.
        optimizer: a learned optimizer for this structure, or what :func:`gmn_lopt.load` takes.

    Returns:
        Lines to print: for each treatment how many entries get it, in which parameters, and why no better one.

    Raises:
        SerializationError: there is no such optimizer.

    Example:
        >>> loss = lambda params, x: jnp.mean((jnp.tanh(x @ params["w"] * params["scale"]) @ params["v"]) ** 2)
        >>> params = {"scale": jnp.ones(8), "v": jnp.ones((8, 2)), "w": jnp.ones((3, 8))}
        >>> print(explain(gmn_lopt.analyze(loss, params, jnp.ones((4, 3)))))  # doctest: +ELLIPSIS
        8 of 48 entries: Adam's direction: a scale: multiplied with activations
          ['scale']
        40 of 48 entries: the denoised step, by their factors
          ['v'], ['w']
        state: ... bytes, ... times the parameters (Adam's: 2)
    """
    lopt = optimizer if isinstance(optimizer, LearnedOptimizer) else load_learned(optimizer, structure)[0]
    groups: dict[str, list[int]] = {}
    for index, treatment in enumerate(lopt.direction.treatment(structure)):
        groups.setdefault(treatment, []).append(index)
    total = sum(p.size for p in structure.parameters)
    lines = []
    for treatment, indices in groups.items():
        entries = sum(structure.parameters[i].size for i in indices)
        lines.append(f"{entries:,} of {total:,} entries: {treatment}")
        lines += list_alike([structure.parameters[i].name for i in indices])
    if lopt.residual is not None:
        reads = "factors and gradients" if lopt.residual.needs_factors(structure) else "gradients"
        lines.append(f"to all of them a network adds its part, which reads {reads}")
    size, own = _bytes(_state(lopt)), sum(p.size * np.dtype(p.dtype).itemsize for p in structure.parameters)
    lines.append(f"state: {size:,} bytes, {size / max(own, 1):.1f} times the parameters (Adam's: 2)")
    return "\n".join(lines)


def _state(lopt: LearnedOptimizer) -> PyTree:
    leaves = [jax.ShapeDtypeStruct(p.shape, jnp.dtype(p.dtype)) for p in lopt.structure.parameters]
    params = jax.tree.unflatten(lopt.structure.treedef, leaves)
    settings = {"total_steps": 1} if lopt.wants_total_steps else {}
    return jax.eval_shape(lambda params: lopt.optimizer(lopt.init(jax.random.key(0)), **settings).init(params), params)


def _bytes(tree: PyTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
