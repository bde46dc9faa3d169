"""Transformers: their factors, the symmetries that are claimed of them, and how learned optimizers respect those."""

import jax
import numpy as np
import permute
import pytest
import transformers

from gmn_lopt import analyze, value_grad_and_factors

LIBRARIES = {"haiku": "haiku", "equinox": "equinox"}


def build(name):
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    model, permutable = transformers.MODELS[name]
    return *model(), permutable


@pytest.mark.parametrize("name", transformers.MODELS)
def test_factors_and_symmetries(name):
    loss, params, args, permutable = build(name)
    structure = analyze(loss, params, *args)
    assert sorted(space.size for space in structure.spaces if space.permutable) == permutable

    @jax.jit
    def everything(params):
        value, grads, factors = value_grad_and_factors(loss)(params, *args)
        return value, grads, factors, structure.reconstruct(factors), jax.grad(loss)(params, *args)

    value, grads, factors, rebuilt, plain = everything(params)
    by_leaf = zip(
        structure.parameters,
        jax.tree.leaves(rebuilt, is_leaf=lambda x: x is None),
        jax.tree.leaves(grads),
        jax.tree.leaves(plain),
        strict=True,
    )
    for parameter, got, dense, want in by_leaf:
        np.testing.assert_allclose(dense, want, rtol=1e-4, atol=1e-6)
        assert (got is None) == (parameter.status != "factored")
        if got is not None:
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6, err_msg=parameter.name)
        else:
            assert any(word in parameter.name.lower() for word in ("norm", "position"))
        assert parameter.sites
    for i in structure.token_ids:
        assert factors.activations[i].shape[1] == 1 and factors.activations[i].dtype == np.int32

    permutations = permute.draw(structure, 1)
    moved_value, moved_grads, moved_factors, *_ = everything(permute.parameters(structure, permutations, params))
    np.testing.assert_allclose(moved_value, value, rtol=1e-5)
    moved = (moved_grads, moved_factors)
    expected = permute.parameters(structure, permutations, grads), permute.factors(structure, permutations, factors)
    for got, want in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
