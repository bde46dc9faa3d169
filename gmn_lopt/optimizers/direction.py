"""Base directions as optimizers of their own, with no network and coefficients that are given in a line of text."""

import re

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer


def parse_direction(text: str, structure: GradientStructure) -> tuple[LearnedOptimizer, PyTree]:
    """Parse a base direction and its step size.

    Args:
        text: ``BASE:ALPHA`` for a constant step size, ``BASE:ALPHA:TAU:POWER`` for
            ``ALPHA (1 + step / TAU)^-POWER``, ``BASE:ALPHA:TAU:POWER:GAIN:OVERSHOOT`` for one that is adapted from
            there (:mod:`gmn_lopt.optimizers.step_size`); slashes will do for colons.
        structure: of the model that it is to train.

    Returns:
        The optimizer, and its meta-parameters.

    Raises:
        ValueError: in one line, text that is no direction.
    """
    base, *numbers = re.split("[:/]", text)
    try:
        values = dict(zip(("alpha", "tau", "power", "gain", "overshoot"), map(float, numbers)))
    except ValueError:
        values = {}
    possible = values and 0 < min(values.values()) <= max(values.values()) < float("inf")
    if len(numbers) not in (1, 3, 5) or not possible:
        raise ValueError(
            f"direction {text!r}: write BASE:ALPHA, BASE:ALPHA:TAU:POWER or BASE:ALPHA:TAU:POWER:GAIN:OVERSHOOT, "
            "all numbers positive"
        )
    try:
        lopt = LearnedOptimizer(structure, "sgdm", base=base, decay=len(values) >= 3, adapt=len(values) == 5)
    except ValueError as error:
        raise ValueError(f"direction {text!r}: {error}") from None
    return lopt, lopt.init(jax.random.key(0)) | {f"log_{n}": jnp.log(jnp.float32(v)) for n, v in values.items()}
