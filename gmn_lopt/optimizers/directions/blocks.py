"""How large the matrices of the denoised direction may be: the rule that bounds its state and its time.

The matrices of a layer's activations would be ``[inputs, inputs]``, whatever its outputs. They are cut into blocks on
the diagonal, of rows that follow each other: none has more than :data:`LARGEST` rows, and all matrices of a model
together hold at most :data:`BUDGET` numbers for each parameter, and :data:`FEW` for each kernel, which a square layer
with a bias needs. With momentum and the last update that is three times the state of Adam. Where a model is above, the
layer that is furthest above gets smaller blocks, until the model is not; blocks of one row are a diagonal. Layers that
are square, or have more outputs than inputs, are left whole.

So are layers of up to :data:`SMALL` inputs, which the bound leaves out: a matrix is a quarter of a megabyte at most,
and cut in four it cost a 192-32-10 network on CIFAR-10 0.02 of test loss (docs/findings.md, 2026-11-27).
"""

from collections.abc import Sequence
from typing import NamedTuple

# Adam's state is two numbers for each parameter; three times that, less the momentum and the last update.
BUDGET, FEW = 4, 4
# Rows of a block: its inverse costs their cube. Layers of up to SMALL rows have one.
LARGEST, SMALL = 1280, 256


class MatrixSizes(NamedTuple):
    """Numbers that a group of layers has matrices for.

    Attributes:
        parameters: number of parameters.
        inputs, outputs: sizes of a kernel, the bias's row among the inputs; the largest ones.
        kernels: number of kernels.
        activations: number of distinct activations that they read.
        diagonal: whether the activations' matrix is a diagonal to begin with.
    """

    parameters: int
    inputs: int
    outputs: int
    kernels: int
    activations: int
    diagonal: bool

    def numbers(self, rows: int) -> int:
        """How many numbers the matrices hold with blocks of so many rows; a few for each kernel are not counted."""
        blocks = -(-self.inputs // rows)
        moment = self.inputs if rows == 1 else blocks * rows * rows
        noise = self.outputs**2 if self.outputs <= self.inputs else 0
        return self.activations * 2 * moment + self.kernels * (noise + min(self.inputs, self.outputs) ** 2)


def block_rows(sizes: Sequence[MatrixSizes], others: int) -> list[int]:
    """The rows of the blocks of each group of layers; one: a diagonal.

    Args:
        sizes: those of the groups.
        others: number of parameters that are in none of them, for which Adam's direction keeps one number more.
    """
    rows = [1 if s.diagonal else _even(s.inputs, LARGEST) for s in sizes]
    bounded = [i for i, s in enumerate(sizes) if s.inputs > SMALL or s.diagonal]
    budget = sum(BUDGET * sizes[i].parameters + FEW * sizes[i].kernels for i in bounded) + (BUDGET - 1) * others
    while sum(sizes[i].numbers(rows[i]) for i in bounded) > budget:
        above = {i: sizes[i].numbers(rows[i]) - BUDGET * sizes[i].parameters for i in bounded if rows[i] > 1}
        worst = max(above, key=above.__getitem__, default=None)
        if worst is None or above[worst] <= 0:
            break
        rows[worst] = _even(sizes[worst].inputs, rows[worst] - 1)
    return rows


def _even(inputs: int, most: int) -> int:
    """The rows of blocks of about one size, none with more than ``most``."""
    return -(-inputs // -(-inputs // most))
