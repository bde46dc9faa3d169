"""Dense layers: products of an activation with a kernel, ``u = a W`` (``dot_general``, with any axes and any batch)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array, Float

from gmn_lopt.factors.kinds.base import KernelDims, LayerKind, Matrices
from gmn_lopt.factors.kinds.division import DividedKind, divide_neurons, shared_dims
from gmn_lopt.factors.matrices import stack_layout
from gmn_lopt.factors.program import Equation
from gmn_lopt.factors.spaces import Parameter


@dataclass(frozen=True)
class Dense(DividedKind):
    """A product with a kernel, whose matrices lie between the neurons read and those written."""

    rows_are_elements: ClassVar[bool] = True

    @classmethod
    def match(cls, equation: Equation, kernels: Sequence[int]) -> tuple[LayerKind, int] | None:
        """A product of which one side is a kernel."""
        return (cls(), kernels[0]) if equation.name == "dot_general" and len(kernels) == 1 else None

    def kernel_dims(self, equation: Equation, operand: int) -> KernelDims:
        """Contracted dimensions are inputs; free ones are outputs."""
        contract, batch = (tuple(dims[operand]) for dims in equation.params["dimension_numbers"])
        free = (d for d in range(len(equation.inputs[operand].shape)) if d not in (*contract, *batch))
        return KernelDims(contract, tuple(free), batch)

    def neuron_dims(self, equation: Equation, operand: int, shared: Collection[int]) -> tuple[set[int], set[int]]:
        """Contracted dimensions of the activation, free ones of the kernel, and batch dimensions of both."""
        contract, batch = equation.params["dimension_numbers"]
        apart = {i for i in range(len(batch[0])) if i not in shared}
        other = 1 - operand
        free = [len(value.shape) - len(contract[i]) - len(batch[0]) for i, value in enumerate(equation.inputs)]
        start = len(batch[0]) + (free[0] if operand == 1 else 0)
        read = {*contract[other], *(batch[other][i] for i in apart)}
        return read, apart | set(range(start, start + free[operand]))

    def regions(
        self, equation: Equation, operand: int, kernel: tuple[slice, ...]
    ) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """A block of the inputs, and one of the outputs."""
        (contract, batch), other = equation.params["dimension_numbers"], 1 - operand
        activation = [slice(0, size) for size in equation.inputs[other].shape]
        for mine, theirs in zip((*contract[operand], *batch[operand]), (*contract[other], *batch[other])):
            activation[theirs] = kernel[mine]
        free = [
            [part for d, part in enumerate(parts) if d not in (*contract[i], *batch[i])]
            for i, parts in sorted([(operand, kernel), (other, activation)])
        ]
        return tuple(activation), (*(kernel[d] for d in batch[operand]), *free[0], *free[1])

    def matrices(self, kernel: Parameter) -> Matrices | None:
        """A stack, if every dimension of the kernel runs over neurons, once on each side; a side may be one neuron."""
        if len(kernel.sites) != 2 or max(stack_layout(kernel)[1][1:]) == 1:
            return None
        read, write = (ref.dims for ref in kernel.sites)
        once = len({*read}) == len(read) and len({*write}) == len(write)
        if not once or {*read, *write} != set(range(len(kernel.cut_shape))):
            return None
        return Matrices(*stack_layout(kernel)[1], tuple(map(read.index, shared_dims(kernel))))

    def activation_rows(self, kernel: Parameter, activation: Float[Array, "S d_in"]) -> Float[Array, "count S inputs"]:
        """The neurons read, divided among the matrices."""
        return divide_neurons(kernel, 0, activation)
