"""Weights: what a program computes from parameters before it uses them, and where each parameter lies in it.

A parameter is a weight. So is a weight rearranged, a function of weights alone, and what is made of a weight entry by
entry with something else (a mask that is an argument of the loss). A product that takes a weight for its kernel is a
layer of that *derived* kernel. Where a parameter lies in the kernel entry by entry, up to factors and summands, a
:class:`View` says so, and an optimizer may treat it as the kernel that it is but for those.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gmn_lopt.factors.program import Equation, Value

# What leaves every entry in place, as it is.
IDENTITIES = {"copy", "copy_p", "layout_constraint", "mesh_cast", "name", "optimization_barrier", "pcast", "pvary"}
IDENTITIES |= {"reshard", "sharding_constraint"}
# Rearrangements that keep every entry exactly once: a tangent is the same before and after them.
REARRANGEMENTS = {"convert_element_type", "reshape", "squeeze", "transpose"} | IDENTITIES
# Rearrangements of one array: a parameter seen through them is still that parameter.
VIEWS = REARRANGEMENTS | {"broadcast_in_dim", "rev", "scan_slice", "slice"}
# Linear, entry by entry, in the operands that are named; in several at once where they are sums.
SUMS = {"add", "add_any", "sub", "select_n"}
ELEMENTWISE = SUMS | {"div", "mul", "neg"}
PLACEMENTS = {"concatenate", "pad"}


@dataclass(eq=False)
class View:
    """A parameter seen through a chain of equations, entry by entry."""

    leaf: int
    chain: tuple[Equation, ...] = ()

    @property
    def block(self) -> tuple[Any, ...]:
        """Which slice of the parameter it is."""
        return tuple(tuple(e.params["start_indices"]) for e in self.chain if e.name == "slice")

    def through(self, equation: Equation) -> "View":
        """The view after one more equation."""
        return View(self.leaf, (*self.chain, equation))


@dataclass(frozen=True)
class Piece:
    """A block of a weight, and the parameters that lie in it."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    views: tuple[View, ...] = ()

    @property
    def slices(self) -> tuple[slice, ...]:
        """The block as an index."""
        return tuple(slice(start, start + size) for start, size in zip(self.start, self.shape))


@dataclass(frozen=True, eq=False)
class Weight:
    """What is known of a weight.

    Attributes:
        pieces: a partition of it, save what does not depend on parameters.
        raw: whether it is a parameter but for rearrangements.
        whole: whether each entry of the parameters is in it once, as opposed to having been broadcast.
        constant: whether it is linear in the parameters, with nothing but constants of the program.
    """

    pieces: tuple[Piece, ...]
    raw: bool
    whole: bool
    constant: bool

    @property
    def views(self) -> tuple[View, ...]:
        """Those of all pieces."""
        return tuple(view for piece in self.pieces for view in piece.views)


@dataclass
class Dependence:
    """What a value was computed from.

    Attributes:
        data: whether from arguments of the loss or arrays that it closes over.
        given: whether from arguments of the loss.
        leaves: bit mask over the parameters that it has a derivative in.
        layers: bit mask over layers.
    """

    data: bool = False
    given: bool = False
    leaves: int = 0
    layers: int = 0

    def include(self, other: "Dependence") -> None:
        """Add what another value depends on."""
        self.data |= other.data
        self.given |= other.given
        self.leaves |= other.leaves
        self.layers |= other.layers


def parameter(leaf: int, shape: tuple[int, ...]) -> Weight:
    """The weight that a parameter is."""
    return Weight((_whole_piece(shape, View(leaf)),), raw=True, whole=True, constant=True)


def derive(
    equation: Equation, operands: Sequence[tuple[Weight | None, Dependence]], layers_of: dict[int, int]
) -> Weight | None:
    """The weight that an equation makes of weights; None if its output is none.

    ``layers_of`` has for each leaf the mask of the layers whose kernel it is: a norm of a kernel, estimated with
    products (spectral normalisation), is still a function of the kernel alone.
    """
    found = [weight for weight, _ in operands]
    output = equation.outputs[0]
    if equation.name == "stop_gradient" or not output.floating or not any(found):
        return None
    if equation.name in VIEWS and found[0] is not None:
        return _rearranged(equation, found[0])
    made = None
    if equation.name in ELEMENTWISE:
        made = _elementwise(equation, operands, layers_of)
    elif equation.name in PLACEMENTS:
        made = _placed(equation, operands)
    if made is None and not any(of.data or of.layers for _, of in operands):
        made = Weight((), raw=False, whole=all(weight.whole for weight in found if weight), constant=False)
    return made


def pieces_of(weight: Weight, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    """The partition of a weight: one piece of which nothing is known where there is none."""
    return weight.pieces or (_whole_piece(shape),)


def _whole_piece(shape: tuple[int, ...], *views: View) -> Piece:
    return Piece((0,) * len(shape), shape, views)


def _rearranged(equation: Equation, weight: Weight) -> Weight:
    before, after = equation.inputs[0].shape, equation.outputs[0].shape
    moved = [_moved(piece, equation, before, after) for piece in weight.pieces]
    pieces = tuple(piece for piece in moved if piece is not None)
    whole = weight.whole and math.prod(after) <= math.prod(before)
    return replace(weight, pieces=pieces if len(pieces) == len(moved) else (), whole=whole)


def _moved(piece: Piece, equation: Equation, before: tuple[int, ...], after: tuple[int, ...]) -> Piece | None:
    """Where a piece lies after a rearrangement."""
    views = tuple(view.through(equation) for view in piece.views)
    if piece.shape == before:
        return _whole_piece(after, *views)
    sources = _dimensions(equation, before, after)
    if sources is None:
        return None
    start = tuple(0 if d is None else piece.start[d] for d in sources)
    shape = tuple(size if d is None else piece.shape[d] for d, size in zip(sources, after))
    return Piece(start, shape, views)


def _dimensions(equation: Equation, before: tuple[int, ...], after: tuple[int, ...]) -> list[int | None] | None:
    """For each dimension after a rearrangement the one that it was (None: new); None if dimensions are not kept."""
    name = equation.name
    if name in IDENTITIES or name == "convert_element_type":
        return list(range(len(after)))
    if name == "transpose":
        return list(equation.params["permutation"])
    if name == "broadcast_in_dim":
        places = dict(zip(equation.params["broadcast_dimensions"], range(len(before))))
        kept = {target: source for target, source in places.items() if before[source] == after[target]}
        return [kept.get(d) for d in range(len(after))]
    wide = [d for d, size in enumerate(before) if size != 1]
    if name in ("reshape", "squeeze") and [before[d] for d in wide] == [size for size in after if size != 1]:
        rest = iter(wide)
        return [None if size == 1 else next(rest) for size in after]
    return None


def _elementwise(
    equation: Equation, operands: Sequence[tuple[Weight | None, Dependence]], layers_of: dict[int, int]
) -> Weight | None:
    shape = equation.outputs[0].shape
    linear = {"div": (0,), "select_n": range(1, len(operands))}.get(equation.name, range(len(operands)))
    parts = [
        (i, weight)
        for i, (weight, _) in enumerate(operands)
        if i in linear and weight is not None and weight.whole and equation.inputs[i].shape == shape
    ]
    if not parts:
        return None
    own = 0
    for view in (view for _, weight in parts for view in weight.views):
        own |= layers_of.get(view.leaf, 0)
    places = {i for i, _ in parts}
    others = [of for i, (_, of) in enumerate(operands) if i not in places]
    if any(of.layers & ~own for of in others):
        return None
    constant = not any(of.leaves or of.given or of.layers for of in others) and all(w.constant for _, w in parts)
    pieces: tuple[Piece, ...] = ()
    if len(parts) == 1:
        pieces = tuple(_through(piece, equation) for piece in parts[0][1].pieces)
    elif equation.name == "select_n" and not all(w.pieces for _, w in parts):
        constant = False
    elif equation.name in SUMS and all(piece.shape == shape for _, w in parts for piece in w.pieces):
        views = tuple(view for _, weight in parts for view in weight.views)
        pieces = (_through(Piece((0,) * len(shape), shape, views), equation),) if views else ()
    else:
        constant &= equation.name in SUMS
    return Weight(pieces, raw=False, whole=True, constant=constant)


def _through(piece: Piece, equation: Equation) -> Piece:
    return replace(piece, views=tuple(view.through(equation) for view in piece.views))


def _placed(equation: Equation, operands: Sequence[tuple[Weight | None, Dependence]]) -> Weight | None:
    """A concatenation or a padded array: each weight has a block of it."""
    if any(weight is not None and not weight.whole for weight, _ in operands):
        return None
    if equation.name == "pad":
        config = equation.params["padding_config"]
        if operands[0][0] is None or any(low < 0 or high < 0 or inside for low, high, inside in config):
            return None
        starts = [tuple(int(low) for low, _, _ in config)]
    else:
        d, starts, at = equation.params["dimension"], [], 0
        for value in equation.inputs:
            starts.append(tuple(at if e == d else 0 for e in range(len(value.shape))))
            at += value.shape[d]
    pieces, constant = [], True
    for (weight, of), start, value in zip(operands, starts, equation.inputs):
        constant &= weight.constant if weight is not None else not (of.leaves or of.given or of.layers)
        if weight is not None:
            known = weight.pieces if len(weight.pieces) == 1 and weight.pieces[0].shape == value.shape else ()
            views = tuple(view.through(equation) for piece in known for view in piece.views)
            pieces.append(Piece(start, value.shape, views))
    return Weight(tuple(pieces), raw=False, whole=True, constant=constant)


def differentiable(equations: Sequence[Equation], output: Value) -> set[Value]:
    """The values in which the output has a derivative."""
    live = {output}
    for equation in reversed(equations):
        if equation.name != "stop_gradient" and any(value in live for value in equation.outputs):
            live.update(value for value in equation.inputs if value.floating)
    return live
