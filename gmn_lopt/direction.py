"""Base directions as optimizers of their own, with no network and coefficients that are given in a line of text."""

import re

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gmn_lopt.learned_optimizer import LearnedOptimizer
from gmn_lopt.structure import GradientStructure


def parse_direction(text: str, structure: GradientStructure) -> tuple[LearnedOptimizer, PyTree]:
    """Parse a base direction and its step size.

    Args:
        text: ``BASE:ALPHA`` for a constant step size, ``BASE:ALPHA:TAU:POWER`` for
            ``ALPHA (1 + step / TAU)^-POWER``; slashes will do for colons.
        structure: of the model that it is to train.

    Returns:
        The optimizer, and its meta-parameters.

    Raises:
        ValueError: in one line, text that is no direction.
    """
    base, *numbers = re.split("[:/]", text)
    try:
        values = dict(zip(("alpha", "tau", "power"), map(float, numbers)))
    except ValueError:
        values = {}
    if len(numbers) not in (1, 3) or not values or not 0 < min(values.values()) <= max(values.values()) < float("inf"):
        raise ValueError(f"direction {text!r}: write BASE:ALPHA or BASE:ALPHA:TAU:POWER, all numbers positive")
    try:
        lopt = LearnedOptimizer(structure, "sgdm", base=base, decay=len(values) == 3)
    except ValueError as error:
        raise ValueError(f"direction {text!r}: {error}") from None
    return lopt, lopt.init(jax.random.key(0)) | {f"log_{n}": jnp.log(jnp.float32(v)) for n, v in values.items()}
