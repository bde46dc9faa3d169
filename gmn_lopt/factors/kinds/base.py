"""What a kind of linear layer has to know about itself."""

import abc
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jaxtyping import Array, Float, Num, Shaped

from gmn_lopt.factors.program import Equation
from gmn_lopt.factors.spaces import Parameter


class KernelDims(NamedTuple):
    """The dimensions of an equation's kernel operand; others are positions of the kernel, too, but without an order.

    Attributes:
        inputs: they run over the neurons that the layer reads.
        outputs: they run over the neurons that it writes.
        batch: each of their positions is a layer by itself (heads).
        positions: they run over the positions of a window, in the order of the window's axes.
        groups: how many layers by themselves the outputs are cut into, and the neurons that are read.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    groups: int = 1


class Arrangement(NamedTuple):
    """How an array is brought to its canonical form ``[S, d]``.

    Attributes:
        shape: the array's own shape.
        cut: its shape with axes cut into their parts, none of size one.
        order: the order of the parts in the canonical form.
        set_parts: how many of them, the first, are the set.
    """

    shape: tuple[int, ...]
    cut: tuple[int, ...]
    order: tuple[int, ...]
    set_parts: int

    def dims(self) -> tuple[int, ...]:
        """For each part, in the array's own order, the dimension that it is a part of."""
        result: list[int] = []
        for d, size in enumerate(self.shape):
            while size > 1:
                size //= self.cut[len(result)]
                result.append(d)
        return tuple(result)


@dataclass(frozen=True)
class Matrices:
    """A kernel as ``count`` matrices ``[inputs, outputs]``.

    ``cut`` says how the neurons that are read are divided among the matrices: kernels that read the same activation
    share its matrices if they are equal in it.
    """

    count: int
    inputs: int
    outputs: int
    cut: Hashable = ()


class LayerKind(abc.ABC):
    """A kind of linear layer ``u = a W + b``: its equation, its factors, and its kernel as matrices.

    An object is one layer's kind, with what of its geometry the methods need; it is static, hashable, and equal to that
    of other layers that are treated alike (a frozen dataclass). Defaults are those of a layer that reads neurons, and
    whose kernel is one matrix. An ``operand`` is the position of the kernel among the two inputs of an equation; the
    activation is the other.

    Attributes:
        reads_neurons: whether the activations are neurons. If not they are at no site of the structure, :meth:`record`
            may keep something else than the operand, and a bias is not taken for one more row of the kernel.
        has_diagonal_moment: whether :meth:`second_moment` is a diagonal.
        rows_are_elements: whether each row of :meth:`activation_rows` is an element of the set.
    """

    reads_neurons: ClassVar[bool] = True
    has_diagonal_moment: ClassVar[bool] = False
    rows_are_elements: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def match(cls, equation: Equation, kernels: Sequence[int]) -> "tuple[LayerKind, int] | None":
        """The kind and kernel operand of an equation that is such a layer, None of any other.

        ``kernels`` says which of its operands are parameters, or views of one; at least one is.
        """

    @abc.abstractmethod
    def kernel_dims(self, equation: Equation, operand: int) -> KernelDims:
        """What the dimensions of the kernel run over."""

    @abc.abstractmethod
    def neuron_dims(self, equation: Equation, operand: int, shared: Collection[int]) -> tuple[set[int], set[int]]:
        """The dimensions of the activation and of the output that are neurons; all others are the set.

        ``shared`` are positions in ``KernelDims.batch`` along which the kernel is only repeated; they are of the set.
        """

    def regions(
        self, equation: Equation, operand: int, kernel: tuple[slice, ...]
    ) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """What a block of the kernel reads of the activation and writes of the output; None: blocks are not told apart.

        A kernel may be a concatenation of parameters, each of which is then a layer by itself.
        """
        return None

    def product(self, equation: Equation, operand: int, kernel: Array, recorded: Array) -> Array:
        """The layer's output, linear in the kernel; its transpose makes the kernel's gradient of a tangent."""
        return equation.bind(*((kernel, recorded) if operand == 0 else (recorded, kernel)))

    def record(self, equation: Equation, activation: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """What is kept of the activation operand."""
        return activation

    def recorded_dims(self, rank: int) -> tuple[int, ...]:
        """The dimensions of the activation operand whose positions are kept; of all others one."""
        return tuple(range(rank))

    def arranged(
        self, equation: Equation, activation: Arrangement, tangent: Arrangement, backwards: tuple[bool, ...]
    ) -> "LayerKind":
        """The kind with what it has to know of the canonical forms of its factors.

        An axis in front of each array runs over the iterations of each loop around the layer. ``backwards`` says along
        which of the kernel's positions the equation sees those of the parameter in reversed order.
        """
        return self

    @property
    def family(self) -> Hashable:
        """What layers of one kernel have to have in common for their sets to be one; None: each has its own."""
        return self

    @abc.abstractmethod
    def matrices(self, kernel: Parameter) -> Matrices | None:
        """The kernel as matrices; None if it is something else."""

    def as_matrices(self, kernel: Parameter, value: Float[Array, "..."]) -> Float[Array, "count inputs outputs"]:
        """An array shaped like the kernel as matrices."""
        return value[None]

    def from_matrices(self, kernel: Parameter, matrices: Float[Array, "count inputs outputs"]) -> Float[Array, "..."]:
        """Undo :meth:`as_matrices`."""
        return matrices[0]

    def activation_rows(self, kernel: Parameter, activation: Num[Array, "S _"]) -> Num[Array, "count S _"]:
        """What each of the matrices reads, as rows."""
        return activation[None]

    def tangent_rows(self, kernel: Parameter, tangent: Float[Array, "S d_out"]) -> Float[Array, "count S outputs"]:
        """What each of the matrices writes, as rows."""
        return tangent[None]

    def from_tangent_rows(self, kernel: Parameter, rows: Float[Array, "count S outputs"]) -> Float[Array, "S d_out"]:
        """Undo :meth:`tangent_rows`."""
        return rows[0]

    def noise_rows(
        self,
        kernel: Parameter,
        activation: Num[Array, "S _"],
        tangent: Float[Array, "S_out d_out"],
        biased: bool,
        damping: float,
    ) -> Float[Array, "count R outputs"]:
        """Rows ``r`` whose mean ``E_R[r r^T] / R`` stands for the noise of the gradient, tangents at per-element scale.

        That of elements that differ independently is of the tangents themselves. ``biased`` says whether a bias is one
        more row of the matrices, ``damping`` by how much of the mean of its diagonal their second moment is increased.
        """
        return self.tangent_rows(kernel, tangent)

    def second_moment(self, rows: Num[Array, "count S _"], inputs: int) -> Float[Array, "count ..."]:
        """``E_S[a a^T]`` of the rows of :meth:`activation_rows`, a matrix, or its diagonal."""
        return rows.mT @ rows / rows.shape[1]
