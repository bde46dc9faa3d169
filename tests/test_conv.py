"""Convolutions: factors that give the gradient back, their matrices, and what optimizers make of them."""

import convolutions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizing import relative_difference

import gmn_lopt
from gmn_lopt.factors import Conv
from gmn_lopt.optimizers.directions.denoised_layers import (
    as_matrices,
    from_matrices,
    layer_groups,
)


def factored(model):
    loss, params, args = model
    structure = gmn_lopt.analyze(loss, params, *args)
    value, grads, factors = jax.jit(gmn_lopt.value_grad_and_factors(loss))(params, *args)
    return structure, value, grads, factors


@pytest.mark.parametrize("name", convolutions.CONVOLUTIONS)
def test_factors_give_the_gradient_back_and_so_do_patches(name):
    loss, params, args = model = convolutions.CONVOLUTIONS[name]()
    structure, value, grads, factors = factored(model)
    assert [p.status for p in structure.parameters] == ["factored"] * len(structure.parameters)
    expected = jax.value_and_grad(loss)(params, *args)
    assert relative_difference((value, grads), expected) < 1e-5
    assert relative_difference(structure.reconstruct(factors), expected[1]) < 1e-5

    leaves = jax.tree.leaves(grads)
    (group,) = (g for g in layer_groups(structure, range(len(leaves))) if isinstance(g.kind, Conv))
    (layer,) = group.layers
    matrices = as_matrices(group, structure.parameters, leaves)
    for position, leaf in from_matrices(group, structure.parameters, matrices).items():
        np.testing.assert_array_equal(leaf, leaves[position])
    patches = group.kind.activation_rows(layer.parameter, factors.activations[layer.activation])
    if group.biased:
        patches = jnp.pad(patches, ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
    images = group.kind.tangent.images(factors.tangents[layer.tangent])
    rows = group.kind.tangent_rows(layer.parameter, images.reshape(-1, images.shape[-1]))
    assert relative_difference(patches.mT @ rows, matrices) < 1e-5
