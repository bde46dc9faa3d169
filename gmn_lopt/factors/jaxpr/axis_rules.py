"""How each primitive carries axes from its inputs to its outputs: one handler per primitive, in a table.

A rule takes the atoms, the equation and the axes of its inputs, and returns the axes of its outputs. A primitive
without a rule fixes everything it touches, which is always safe.
"""

from collections.abc import Callable
from typing import NamedTuple

from gmn_lopt.factors.jaxpr.axes import Atoms, Axis, fix, resolve
from gmn_lopt.factors.program import Equation

Axes = tuple[Axis, ...]
Rule = Callable[[Atoms, Equation, list[Axes]], list[Axes]]


def apply_rule(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """The axes of an equation's outputs."""
    return RULES.get(equation.name, unknown)(atoms, equation, inputs)


def unknown(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Anything may happen: no axis may be permuted."""
    for axes in inputs:
        for axis in axes:
            fix(axis)
    return [atoms.new_axes(value.shape, fixed=True) for value in equation.outputs]


def elementwise(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Axes of one dimension are the same; size 1 broadcasts against anything, and so do scalars."""
    shape = equation.outputs[0].shape
    result = []
    for d, size in enumerate(shape):
        alike = [
            axes[d]
            for value, axes in zip(equation.inputs, inputs)
            if len(value.shape) == len(shape) and value.shape[d] == size
        ]
        axis = alike[0] if alike else atoms.new(size)
        for other in alike[1:]:
            axis = atoms.unify(axis, other)
        result.append(axis)
    return [tuple(result)] * len(equation.outputs)


def broadcast_in_dim(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """New axes are uniform, so they may be permuted."""
    shape = equation.params["shape"]
    result = list(atoms.new_axes(shape))
    for source, target in enumerate(equation.params["broadcast_dimensions"]):
        if equation.inputs[0].shape[source] == shape[target]:
            result[target] = inputs[0][source]
    return [tuple(result)]


def reshape(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Cut and join products; an explicit order of dimensions is a transpose first."""
    axes = inputs[0]
    dimensions = equation.params.get("dimensions")
    if dimensions is not None:
        axes = tuple(axes[d] for d in dimensions)
    return [atoms.reshape(axes, equation.outputs[0].shape)]


def transpose(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Reorder."""
    return [tuple(inputs[0][d] for d in equation.params["permutation"])]


def squeeze(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Drop axes of size 1."""
    rank = len(equation.inputs[0].shape)
    dropped = {d % rank for d in equation.params["dimensions"]}
    return [tuple(axis for d, axis in enumerate(inputs[0]) if d not in dropped)]


def reduce(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """A symmetric reduction drops its axes."""
    dropped = set(equation.params["axes"])
    return [tuple(axis for d, axis in enumerate(inputs[0]) if d not in dropped)]


def collective(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """A symmetric reduction of each array: over axes that ``vmap`` has made of named ones, and over devices."""
    dropped = {d for d in equation.params["axes"] if isinstance(d, int)}
    return [tuple(axis for d, axis in enumerate(axes) if d not in dropped) for axes in inputs]


def arg_reduce(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """The position of the extreme matters."""
    for d in equation.params["axes"]:
        fix(inputs[0][d])
    return reduce(atoms, equation, inputs)


def along(key: str) -> Rule:
    """Something happens by position along one dimension or several; the others are carried."""

    def rule(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
        named = equation.params[key]
        for d in (named,) if isinstance(named, int) else named:
            for axes in inputs:
                fix(axes[d])
        return elementwise(atoms, equation, inputs)

    return rule


def dot_general(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Contracted and batch pairs are the same; the free axes of both sides go on."""
    (left_contract, right_contract), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = inputs
    for i, j in zip(left_contract, right_contract):
        atoms.unify(left[i], right[j])
    batch = tuple(atoms.unify(left[i], right[j]) for i, j in zip(left_batch, right_batch))
    left_free = tuple(axis for d, axis in enumerate(left) if d not in (*left_contract, *left_batch))
    right_free = tuple(axis for d, axis in enumerate(right) if d not in (*right_contract, *right_batch))
    return [batch + left_free + right_free]


def conv_general_dilated(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Channels read are the kernel's inputs, group by group; those written are its outputs. Positions are fixed.

    An axis of channels in groups is a product, groups times what each of them has; a group of the channels that are
    read belongs to one of those that are written.
    """
    numbers, groups = equation.params["dimension_numbers"], equation.params["feature_group_count"]
    if equation.params["batch_group_count"] != 1:
        return unknown(atoms, equation, inputs)
    (image, kernel), shape = inputs, equation.outputs[0].shape
    channels_in, positions = numbers.lhs_spec[1], numbers.lhs_spec[2:]
    outputs, within, *window = numbers.rhs_spec
    for d in window:
        fix(kernel[d])
    if groups == 1:
        atoms.unify(image[channels_in], kernel[within])
        written = kernel[outputs]
    else:
        sizes_in, sizes_out = equation.inputs[0].shape[channels_in], equation.inputs[1].shape[outputs]
        group_in, read = atoms.reshape((image[channels_in],), (groups, sizes_in // groups))
        group_out, rest = atoms.reshape((kernel[outputs],), (groups, sizes_out // groups))
        atoms.unify(read, kernel[within])
        written = (*atoms.unify(group_in, group_out), *resolve(rest))
    axes: dict[int, Axis] = {numbers.out_spec[0]: image[numbers.lhs_spec[0]], numbers.out_spec[1]: written}
    for i, (d, out) in enumerate(zip(positions, numbers.out_spec[2:])):
        size = equation.inputs[1].shape[window[i]]
        moves = _Window(size, *(equation.params[name][i] for name in ("window_strides", "padding", "lhs_dilation")))
        axes[out] = moves.along(atoms, image[d], equation.inputs[0].shape[d], shape[out])
    return [tuple(axes[d] for d in range(len(shape)))]


def reduce_window(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Pooling: what is pooled over is used by position."""
    names = ("window_dimensions", "window_strides", "padding", "base_dilation")
    shapes = equation.inputs[0].shape, equation.outputs[0].shape
    windows = (_Window(*window) for window in zip(*(equation.params[name] for name in names)))
    rows = list(zip(windows, *shapes))
    arrays = inputs[: len(equation.outputs)]
    return [tuple(w.along(atoms, x, size, out) for x, (w, size, out) in zip(axes, rows)) for axes in arrays]


class _Window(NamedTuple):
    """How a window moves along one dimension."""

    size: int
    stride: int
    padding: tuple[int, int]
    dilation: int

    def along(self, atoms: Atoms, axis: Axis, size: int, out: int) -> Axis:
        """The axis of the results: the same where each position is by itself, and else fixed.

        Windows of stride one with as many results as positions have one at each position: element by element it is
        the same set, as it has to be where a block's output is added to its input.
        """
        if (self.size, self.stride, tuple(self.padding), self.dilation) == (1, 1, (0, 0), 1):
            return axis
        fix(axis)
        return axis if (self.stride, self.dilation, out) == (1, 1, size) else atoms.new(out, fixed=True)


def slice_(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Blocks of equal size are a cut; anything else uses positions."""
    shape = equation.inputs[0].shape
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(shape)
    result = []
    for axis, size, start, limit, stride, out in zip(
        inputs[0], shape, starts, limits, strides, equation.outputs[0].shape
    ):
        if stride == 1:
            result.append(atoms.block(axis, size, start, limit))
        else:
            fix(axis)
            result.append(atoms.new(out, fixed=True))
    return [tuple(result)]


def concatenate(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """The concatenated axis is the direct sum of its parts; all others are the same."""
    d = equation.params["dimension"]
    result = list(inputs[0])
    for axes in inputs[1:]:
        for e, axis in enumerate(axes):
            if e != d:
                result[e] = atoms.unify(result[e], axis)
    result[d] = atoms.join([(value.shape[d], axes[d]) for value, axes in zip(equation.inputs, inputs)])
    return [tuple(result)]


def pad(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """A padded axis is used by position."""
    result = []
    for axis, config, size in zip(inputs[0], equation.params["padding_config"], equation.outputs[0].shape):
        if any(config):
            fix(axis)
            axis = atoms.new(size, fixed=True)
        result.append(axis)
    return [tuple(result)]


def gather(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Whole slices carry their axis, whatever their (clamped) start; indexed axes are used by position."""
    operand = equation.inputs[0]
    numbers, slices = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    index_axes = inputs[1][:-1]
    for d, e in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims):
        atoms.unify(inputs[0][d], index_axes[e])
    offset = []
    for d, (size, length) in enumerate(zip(operand.shape, slices)):
        if d in numbers.operand_batching_dims:
            continue
        whole = size == length
        if not whole:
            fix(inputs[0][d])
        if d not in numbers.collapsed_slice_dims:
            offset.append(inputs[0][d] if whole else atoms.new(length, fixed=True))
    remaining, carried = iter(offset), iter(index_axes)
    rank = len(equation.outputs[0].shape)
    return [tuple(next(remaining) if d in numbers.offset_dims else next(carried) for d in range(rank))]


def cond_exit(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """The results of all branches are alike."""
    first, *others = inputs[1:]
    for axes in others:
        first = tuple(map(atoms.unify, first, axes))
    return [first]


def scan_index(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """The iterations of a loop come in an order."""
    return [atoms.new_axes(equation.outputs[0].shape, fixed=True)]


def scan_enter(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Every iteration's carry is like the first one."""
    return inputs


def scan_slice(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """The scanned axis is the counter's (where that is given), and is dropped."""
    whole, *index = inputs
    for (counter,) in index:
        atoms.unify(counter, whole[0])
    return [whole[1:]]


def scan_exit(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """The carries that an iteration starts and ends with are alike; its other outputs are stacked."""
    count = equation.params["carries"]
    (index, *carries), results = inputs[: 1 + count], inputs[1 + count :]
    last = [tuple(map(atoms.unify, before, after)) for before, after in zip(carries, results)]
    return [*last, *((*index, *axes) for axes in results[count:])]


def iota(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Positions themselves along one dimension, uniform along the others."""
    shape, dimension = equation.outputs[0].shape, equation.params["dimension"]
    return [tuple(atoms.new(size, fixed=d == dimension) for d, size in enumerate(shape))]


def random_bits(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Independent draws: a permutation of them has the same distribution, so it may be permuted."""
    shape = equation.params["shape"]
    key_rank = len(equation.outputs[0].shape) - len(shape)
    return [inputs[0][:key_rank] + atoms.new_axes(shape)]


def bitcast(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Elementwise between types of equal width; otherwise an axis of bytes comes or goes."""
    same_rank = len(equation.inputs[0].shape) == len(equation.outputs[0].shape)
    return (elementwise if same_rank else unknown)(atoms, equation, inputs)


def _table() -> dict[str, Rule]:
    names = """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    clz conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge
    gt igamma igammac imag integer_pow is_finite layout_constraint le lgamma log log1p logistic lt max mesh_cast
    min mul name ne neg nextafter not optimization_barrier or pcast polygamma population_count pow ppermute
    psum_invariant pvary real reduce_precision regularized_incomplete_beta rem reshard round rsqrt select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    stop_gradient sub tan tanh xor zeta"""
    table: dict[str, Rule] = {name: elementwise for name in names.split()}
    table |= {f"reduce_{name}": reduce for name in ("sum", "max", "min", "prod", "and", "or", "xor")}
    table |= {name: along("axis") for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")}
    table |= {name: collective for name in ("psum", "pmax", "pmin")}
    table |= {name: arg_reduce for name in ("argmax", "argmin")}
    table |= {"bitcast_convert_type": bitcast, "rev": along("dimensions"), "slice": slice_}
    table |= {f"reduce_window{name}": reduce_window for name in ("", "_sum", "_max", "_min")}
    named = [
        broadcast_in_dim,
        concatenate,
        cond_exit,
        conv_general_dilated,
        dot_general,
        gather,
        iota,
        pad,
        random_bits,
        reshape,
        squeeze,
    ]
    named += [transpose, scan_enter, scan_exit, scan_index, scan_slice]
    return table | {rule.__name__: rule for rule in named}


RULES = _table()
