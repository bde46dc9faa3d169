"""The layer of universal neural functionals: it spans all equivariant maps, and is the sum that it is defined as."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import unf_reference

from gmn_lopt.networks.initialization import init_weights
from gmn_lopt.networks.unf import EquivariantLinear

# The spaces of each leaf, the sizes of the spaces, and along which others a space is stacked.
CASES = {
    "two layers": (((1,), (0, 1), (2,), (1, 2)), {0: 2, 1: 3, 2: 2}),
    "a space twice in a leaf": (((0, 0), (0,)), {0: 4}),
    "a space smaller than the matchings": (((0, 0), (0,)), {0: 3}),
    "a space shared by three leaves": (((0, 1), (1, 2), (3, 1)), {0: 2, 1: 3, 2: 2, 3: 2}),
    "recurrent, with a scalar": (((0, 1), (1, 1), (1,), ()), {0: 2, 1: 4}),
    "a space thrice in a leaf": (((0, 0, 0),), {0: 3}),
    "heads": (((0, 1, 2), (1, 2), (1, 2, 0)), {0: 3, 1: 2, 2: 2}),
    "stacked": (((0, 1, 2), (0, 2), (2, 0, 1), (1,)), {0: 2, 1: 2, 2: 2}, {2: (0,)}),
    "stacked and recurrent": (((0, 1, 1), (0, 1)), {0: 2, 1: 4}, {1: (0,)}),
    "a stack of stacks": (((0, 1, 2, 3), (0, 1, 3)), {0: 2, 1: 2, 2: 2, 3: 2}, {3: (0, 1)}),
    "stacked, its stack twice in a leaf": (((0, 0, 1), (0, 1)), {0: 4, 1: 2}, {1: (0,)}),
}


def case(name):
    """The leaves, the sizes, and the stacks, if there are any."""
    leaves, sizes, *stacks = CASES[name]
    return leaves, sizes, stacks[0] if stacks else {}


def layer(leaves, stacks, in_features, out_features):
    return EquivariantLinear(leaves, in_features, out_features, tuple(stacks.items()))


def shapes_of(leaves, sizes):
    return [tuple(sizes[s] for s in leaf) for leaf in leaves]


def random_case(name, in_features=3, out_features=2):
    """A layer, weights that are all different, and features."""
    leaves, sizes, stacks = case(name)
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    inputs = [draw((*shape, in_features)) for shape in shapes_of(leaves, sizes)]
    module = layer(leaves, stacks, in_features, out_features)
    weights = jax.tree.map(lambda w: draw(w.shape), jax.eval_shape(module.init, jax.random.key(0), inputs)["params"])
    return module, weights, inputs


def all_maps(leaves, sizes, stacks):
    """The matrices of the layer, for each weight alone, and the constants, for each bias alone."""
    module, shapes = layer(leaves, stacks, 1, 1), shapes_of(leaves, sizes)
    zeros = [np.zeros((*shape, 1), np.float32) for shape in shapes]
    weights = jax.eval_shape(module.init, jax.random.key(0), zeros)
    flat, unflatten = jax.flatten_util.ravel_pytree(jax.tree.map(lambda w: jnp.zeros(w.shape), weights))
    flat_inputs, unflatten_inputs = jax.flatten_util.ravel_pytree(zeros)

    def apply(weights, inputs):
        return jax.flatten_util.ravel_pytree(module.apply(unflatten(weights), unflatten_inputs(inputs)))[0]

    def one(weights):
        constant = apply(weights, flat_inputs)
        return jax.vmap(lambda x: apply(weights, x) - constant)(jnp.eye(flat_inputs.size)), constant

    matrices, constants = jax.jit(jax.vmap(one))(jnp.eye(flat.size))
    return np.asarray(matrices).reshape(flat.size, -1), np.asarray(constants)


@pytest.mark.parametrize("name", CASES)
def test_the_layer_spans_all_equivariant_maps(name):
    maps, constants = all_maps(*case(name))
    dimension, constant_dimension = unf_reference.group_dimension(*case(name))
    assert np.linalg.matrix_rank(maps, tol=1e-4) == dimension
    assert np.linalg.matrix_rank(constants, tol=1e-4) == constant_dimension
    if name not in ("a space smaller than the matchings", "a space thrice in a leaf"):
        assert len(maps) == dimension + constant_dimension  # no weight is superfluous


@pytest.mark.parametrize("name", CASES)
def test_the_layer_is_equivariant(name):
    leaves, sizes, stacks = case(name)
    module, weights, inputs = random_case(name)
    rng = np.random.default_rng(1)
    permutations = {
        space: rng.permuted(np.broadcast_to(np.arange(n), (*(sizes[s] for s in stacks.get(space, ())), n)), axis=-1)
        for space, n in sizes.items()
    }

    def permute(values):
        places = [unf_reference.moved(leaf, sizes, stacks, permutations) for leaf in leaves]
        return [x[place] for place, x in zip(places, map(np.asarray, values))]

    apply = jax.jit(lambda x: module.apply({"params": weights}, x))
    for y, expected in zip(apply(permute(inputs)), permute(apply(inputs)), strict=True):
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_layer_is_the_sum_over_all_matchings(name):
    module, weights, inputs = random_case(name)
    outputs = jax.jit(lambda x: module.apply({"params": weights}, x))(inputs)
    leaves, _, stacks = case(name)
    expected = unf_reference.apply(leaves, stacks, weights, inputs)
    for y, e, x in zip(outputs, expected, inputs, strict=True):
        assert y.shape == (*x.shape[:-1], 2)
        np.testing.assert_allclose(y, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["two layers", "recurrent, with a scalar"])
def test_a_missing_leaf_counts_as_zero(name):
    module, weights, inputs = random_case(name)
    outputs = module.apply({"params": weights}, [None, *inputs[1:]])
    zero = module.apply({"params": weights}, [jnp.zeros_like(inputs[0]), *inputs[1:]])
    assert outputs[0] is None
    for y, expected in zip(outputs[1:], zero[1:], strict=True):
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_weights_do_not_depend_on_sizes_and_outputs_start_at_the_scale_of_inputs():
    leaves, sizes, _ = case("two layers")
    module, found = EquivariantLinear(leaves, 32, 1), []
    for scale in (1, 8):
        inputs = [jax.random.normal(jax.random.key(0), (*(scale * n for n in s), 32)) for s in shapes_of(leaves, sizes)]
        weights = init_weights(module.init, jax.random.key(1), inputs)
        found.append(jax.tree.map(jnp.shape, weights))
        constant = module.apply({"params": weights}, [jnp.ones_like(x) for x in inputs])
        assert all(0.0 < float(jnp.abs(y).max()) < 4.0 for y in constant)
    assert found[0] == found[1]
    # There are 7, 9, 6 and 10 matchings that end in the four leaves.
    assert [found[0][f"kernel_{leaf}"] for leaf in range(4)] == [(32 * matchings, 1) for matchings in (7, 9, 6, 10)]
