"""Transformers: their factors, the symmetries that are claimed of them, and how learned optimizers respect those."""

import jax
import numpy as np
import permute
import pytest
import transformers
from optimizing import lively, play, relative_difference, small

from gmn_lopt import UNF, LearnedOptimizer, SetReader, analyze, value_grad_and_factors
from gmn_lopt.networks.gradmetanet import GradMetaNetConfig

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
        structure.treedef.flatten_up_to(rebuilt),
        jax.tree.leaves(grads),
        jax.tree.leaves(plain),
        strict=True,
    )
    for parameter, got, dense, want in by_leaf:
        np.testing.assert_allclose(dense, want, rtol=1e-4, atol=1e-6)
        if parameter.status == "factored":
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


@pytest.mark.parametrize("scan", [False, True])
def test_permuting_neurons_permutes_the_update(scan):
    """Of the stream, heads, each feed-forward layer and, head by head, the values; with factors of the real loss."""
    loss, params, args = transformers.plain(tied=True, scan=scan, blocks=2 if scan else 1)
    structure = analyze(loss, params, *args)
    reader = SetReader(GradMetaNetConfig(8, product_width=8, out_features=4))
    lopt = LearnedOptimizer(structure, residual=small(gradmetanet=reader))
    phi = lively(lopt)
    differentiate = jax.jit(value_grad_and_factors(loss))

    def updates(params):
        second = jax.tree.map(lambda p: 0.9 * p, params)
        return play(lopt, phi, [(p, *differentiate(p, *args)[1:]) for p in (params, second)])[-1]

    reference, permutations = updates(params), permute.draw(structure, 3)
    update = updates(permute.parameters(structure, permutations, params))
    assert relative_difference(update, permute.parameters(structure, permutations, reference)) < 1e-3

    def move_values(tree):
        """Another order in the second head of the last block."""
        order = np.array([0, 1, 2, 5, 3, 4])
        moved = jax.tree.map(np.array, tree)
        attention = (moved["blocks"] if scan else moved["blocks"][-1])["attention"]
        last = -1 if scan else slice(None)
        for name, axis in (("v", -1), ("v_bias", -1), ("o", -2)):
            attention[name][last] = np.take(attention[name][last], order, axis=axis)
        return moved

    assert relative_difference(updates(move_values(params)), move_values(reference)) < 1e-3
    assert relative_difference(move_values(reference), reference) > 1e-2


@pytest.mark.parametrize("reader", [None, SetReader(GradMetaNetConfig(4, 1, product_width=4, out_features=3))])
def test_neurons_of_each_stacked_layer_permute_the_update_of_unf(reader):
    """Each layer's in another way, as ``permute.draw`` does where a space has a stack."""
    loss, params, args = transformers.plain(scan=True)
    structure = analyze(loss, params, *args)
    stacked = {i for i, space in enumerate(structure.spaces) if space.stack and space.permutable and space.size > 2}
    assert len(stacked) > 2
    lopt = LearnedOptimizer(structure, residual=small(network=UNF(4, 2), gradmetanet=reader))
    phi = lively(lopt)
    differentiate = jax.jit(value_grad_and_factors(loss))
    update = lambda params: play(lopt, phi, [(params, *differentiate(params, *args)[1:])])[0]  # noqa: E731
    permutations = permute.draw(structure, 3)
    assert all(np.any(permutations[i][0] != permutations[i][1]) for i in stacked)
    moved = update(permute.parameters(structure, permutations, params))
    assert relative_difference(moved, permute.parameters(structure, permutations, update(params))) < 1e-3


def test_nothing_of_the_size_of_the_vocabulary_but_parameters_and_the_logits_themselves():
    loss, params, args = transformers.plain(tied=True, blocks=1)
    structure = analyze(loss, params, *args)
    (ids,) = structure.token_ids
    assert structure.activation_shapes[ids] == (transformers.BATCH * transformers.TOKENS, 1)
    wide = [i for i, site in enumerate(structure.sites) if site.size == transformers.VOCABULARY]
    assert [structure.sites[i].kind for i in wide] == ["output"]
    assert all(shape[1] != transformers.VOCABULARY for shape in structure.activation_shapes)
    averages, _ = SetReader(max_output_size=None).init(structure)
    assert [i for i, average in enumerate(averages) if average is None] == [ids]
    averages = SetReader(max_output_size=transformers.VOCABULARY - 1).init(structure)
    assert all(x.shape[-1] != transformers.VOCABULARY for x in jax.tree.leaves(averages))


def test_a_transformer_prints_on_a_screen():
    loss, params, args = transformers.plain()
    lines = str(analyze(loss, params, *args)).splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 120
    assert "  ['embed'] [11x8]: token ids -> site 0" in lines


@pytest.mark.parametrize(
    "used, permutable",
    [
        ({"attention": transformers.alibi}, [3, 3, 5, 8]),
        ({"attention": transformers.ordered_values}, [2, 3, 5, 8]),
        ({"attention": transformers.ordered_stream}, [2, 3, 3, 5]),
        ({"feed": transformers.ordered_hidden}, [2, 3, 3, 8]),
    ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_what_is_used_by_position_has_no_symmetry(used, permutable, scan):
    loss, params, args = transformers.plain(**used, scan=scan, blocks=2 if scan else 1)
    spaces = analyze(loss, params, *args).spaces
    assert sorted(space.size for space in spaces if space.permutable) == permutable
