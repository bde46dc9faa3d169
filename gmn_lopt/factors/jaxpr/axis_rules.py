"""How each primitive carries axes from its inputs to its outputs: one handler per primitive, in a table.

A rule takes the atoms, the equation and the axes of its inputs, and returns the axes of its outputs. A primitive
without a rule fixes everything it touches, which is always safe.
"""

from collections.abc import Callable

from gmn_lopt.factors.jaxpr.axes import Atoms, Axis, fix
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


def split(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Several slices along one dimension."""
    d, start, results = equation.params["axis"], 0, []
    lengths = [int(length) for length in equation.params["sizes"]]
    for length in lengths:
        axes = list(inputs[0])
        if len(set(lengths)) == 1:
            axes[d] = atoms.block(axes[d], sum(lengths), start, start + length)
        else:
            fix(axes[d])
            axes[d] = atoms.new(length, fixed=True)
        results.append(tuple(axes))
        start += length
    return results


def concatenate(atoms: Atoms, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """The parts of the concatenated axis stand at known positions."""
    d = equation.params["dimension"]
    result = list(inputs[0])
    for axes in inputs:
        for e, axis in enumerate(axes):
            if e == d:
                fix(axis)
            else:
                result[e] = atoms.unify(result[e], axis)
    result[d] = atoms.new(equation.outputs[0].shape[d], fixed=True)
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
    clz conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt
    igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg nextafter not or
    polygamma population_count pow real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sharding_constraint reshard sign sin sinh sqrt square
    stop_gradient sub tan tanh xor zeta pvary mesh_cast psum psum_invariant pmax pmin ppermute"""
    table: dict[str, Rule] = {name: elementwise for name in names.split()}
    table |= {f"reduce_{name}": reduce for name in ("sum", "max", "min", "prod", "and", "or", "xor")}
    table |= {name: along("axis") for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")}
    table |= {name: arg_reduce for name in ("argmax", "argmin")}
    table |= {"bitcast_convert_type": bitcast, "rev": along("dimensions"), "slice": slice_}
    named = [broadcast_in_dim, concatenate, dot_general, gather, iota, pad, random_bits, reshape, split, squeeze]
    named += [transpose, scan_enter, scan_exit, scan_index, scan_slice]
    return table | {rule.__name__: rule for rule in named}


RULES = _table()
