"""What a direction has to provide."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array, PyTree

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.optimizers.leaves import Gradient


@dataclass(frozen=True)
class Direction(abc.ABC):
    """The hand-designed part of an update, which the learned part is added to.

    A direction is one file with one class: its fields are where its coefficients start, its state is explicit.

    Attributes:
        sized: whether its size is its own, such as that of an orthogonal matrix, in place of following the gradient's.
    """

    sized: ClassVar[bool]

    @abc.abstractmethod
    def coefficients(self) -> dict[str, float]:
        """The coefficients to learn, and where they start. All are positive, and learned as ``log_NAME``."""

    def needs_factors(self, structure: GradientStructure) -> bool:
        """Whether :meth:`update` has to be given the factors of this model's gradient; most directions have no use."""
        return False

    def rescaled(self, structure: GradientStructure, indices: Sequence[int]) -> frozenset[int]:
        """The positions in ``indices`` of parameters whose steps know the scale of the factors, not of the gradient."""
        return frozenset()

    def treatment(self, structure: GradientStructure) -> list[str]:
        """What is done with each of the parameters, in a few words: equal words for equal treatment."""
        return [f"the direction {type(self).__name__}"] * len(structure.parameters)

    @abc.abstractmethod
    def init(self, structure: GradientStructure, indices: Sequence[int], zeros: PyTree) -> PyTree:
        """The state before the first step.

        Args:
            structure: of the model.
            indices: into ``structure.parameters``: those that are handled, in their order in ``zeros``.
            zeros: float32 zeros, shaped like the parameters.
        """

    @abc.abstractmethod
    def update(self, phi: Mapping[str, Array], gradient: Gradient, state: PyTree) -> tuple[PyTree, PyTree]:
        """Advance by one gradient; ``phi`` holds the coefficients, ``log_NAME`` each.

        Returns:
            The direction, shaped like the gradients, and the new state.
        """
