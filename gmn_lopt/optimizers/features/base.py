"""What a set of features has to provide."""

import abc
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Features(abc.ABC):
    """The channels that a per-parameter network reads, and the moving averages of the gradient that they need.

    Attributes:
        channels: number of channels that differ between the entries of a tensor.
        time_channels: number of channels that all parameters share.
        averages: number of moving averages of each gradient.
    """

    channels: ClassVar[int]
    time_channels: ClassVar[int]
    averages: ClassVar[int]

    @abc.abstractmethod
    def advance(
        self, averages: Float[Array, "averages *shape"], gradient: Float[Array, "*shape"]
    ) -> Float[Array, "averages *shape"]:
        """Advance the moving averages, which start at zero, by one gradient."""

    @abc.abstractmethod
    def of_entries(
        self,
        parameter: Float[Array, "*shape"],
        gradient: Float[Array, "*shape"],
        averages: Float[Array, "averages *shape"],
        count: Int[Array, ""],
    ) -> Float[Array, "size channels"]:
        """The channels of one tensor's entries in row-major order, after ``count`` steps."""

    @abc.abstractmethod
    def of_time(self, count: Int[Array, ""]) -> Float[Array, "times"]:
        """The channels that all parameters share, after ``count`` steps."""
