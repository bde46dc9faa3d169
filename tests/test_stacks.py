"""Many small arrays as few: stacks of padded matrices, and sums of products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmn_lopt.util.stacks import LARGE, inner_products, one_stack


def arrays(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    "shapes",
    [[(2, 3, 4)], [(1, 5, 6), (1, 5, 6)], [(2, 3, 4), (1, 1, 6), (3, 5, 2)], [(1, 0, 3), (1, 2, 0), (1, 1, 1)]],
)
def test_a_stack_holds_each_matrix_padded_with_zeros(shapes):
    given = arrays(*shapes)
    stack = jax.jit(lambda given: one_stack(given, 5, 6))(given)
    expected = [np.pad(m, ((0, 5 - m.shape[0]), (0, 6 - m.shape[1]))) for array in given for m in np.asarray(array)]
    np.testing.assert_array_equal(stack, np.stack(expected))


def test_numbers_that_are_not_finite_stay_in_their_matrix():
    stack = one_stack([jnp.full((1, 1, 2), jnp.nan), jnp.ones((1, 2, 1))], 2, 2)
    np.testing.assert_array_equal(stack[1], [[1, 0], [1, 0]])


def test_inner_products_are_those_of_each_pair_whatever_their_sizes():
    shapes = [(2, 3), (1, 70, 50), (1, 1), (3, 4, 5), (1, LARGE + 3), (1, 2000), (2, 900), (1, 0)]
    x, y = arrays(*shapes), arrays(*shapes, seed=1)
    found = jax.jit(inner_products)(x, y)
    expected = []
    for a, b in zip(x, y):
        for row in range(len(a)):
            pair = np.stack([np.asarray(a[row], np.float64).ravel(), np.asarray(b[row], np.float64).ravel()])
            expected.append(pair @ pair.T)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    assert inner_products([], []).shape == (0, 2, 2)
