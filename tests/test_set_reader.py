"""What GradMetaNet is given to read: no large outputs, a part of a large set."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from optimizing import BATCH, analyzed, lively, mlp, play, record, relative_difference, small

from gmn_lopt import Factors, GradMetaNetConfig, GradMetaNetPlusPlusConfig, LearnedOptimizer, SetReader, analyze

READER = SetReader(GradMetaNetConfig(width=4, set_layers=1, product_width=4, out_features=3))
PLUS_PLUS = SetReader(GradMetaNetPlusPlusConfig(width=4, blocks=1, heads=2, product_width=4, out_features=3))
MODEL = mlp(6, 9, 4)


def reading(structure, reader=READER, **changes):
    return LearnedOptimizer(structure, residual=small(gradmetanet=dataclasses.replace(reader, **changes)))


def test_only_outputs_that_are_fixed_and_too_large_are_left_out():
    loss, params, args = transformers.plain(tied=False, blocks=1)
    structure = analyze(loss, params, *args)
    assert SetReader(max_output_size=None).structure_read(structure) is structure
    assert SetReader(max_output_size=transformers.VOCABULARY).structure_read(structure) is structure
    smaller = SetReader(max_output_size=1).structure_read(structure)
    gone = [site for site in structure.sites if site not in smaller.sites]
    assert [(site.kind, site.size) for site in gone] == [("output", transformers.VOCABULARY)]
    # Queries and keys are only written as well, but no more fixed than any hidden neuron.
    permutable = [s for s in smaller.sites if s.kind == "output"]
    assert permutable and all(any(structure.spaces[i].permutable for i in s.spaces) for s in permutable)
    # Every parameter keeps its other site, which is the same as before.
    for old, new in zip(structure.parameters, smaller.parameters, strict=True):
        left = [(structure.sites[ref.site], ref.dims) for ref in old.sites if structure.sites[ref.site] not in gone]
        assert [(smaller.sites[ref.site], ref.dims) for ref in new.sites] == left


@pytest.mark.parametrize("reader", [READER, PLUS_PLUS])
def test_no_state_and_no_features_come_of_a_large_output(reader):
    model = mlp(5, 4, 9)
    structure = analyzed(model)
    whole, some = (reading(structure, reader, max_output_size=largest) for largest in (9, 8))
    phi, recorded = lively(whole), record(model)
    state = some.optimizer(phi).init(model[1])
    activations, tangents = state.residual.factors
    assert [None if x is None else x.shape for x in tangents] == [(6, BATCH, 4), None]
    assert all(x is not None for x in activations)
    assert relative_difference(play(some, phi, recorded)[-1], play(whole, phi, recorded)[-1]) > 1e-3

    # The logits' tangents say nothing to it: neither their size nor their sign.
    other = [(p, g, dataclasses.replace(f, tangents=(f.tangents[0], -3 * f.tangents[1]))) for p, g, f in recorded]
    assert relative_difference(play(some, phi, other)[-1], play(some, phi, recorded)[-1]) == 0
    assert relative_difference(play(whole, phi, other)[-1], play(whole, phi, recorded)[-1]) > 1e-4


def test_a_model_whose_only_site_is_a_large_output_reads_no_factors():
    def loss(params, ids, labels):
        logits = jax.nn.log_softmax(params["table"][ids])
        return -logits[jax.numpy.arange(len(ids)), labels].mean()

    params = {"table": jax.random.normal(jax.random.key(0), (7, 9))}
    ids = jax.numpy.arange(6)
    structure = analyze(loss, params, ids, ids)
    assert [site.kind for site in structure.sites] == ["output"]
    assert reading(structure).needs_factors
    lopt = reading(structure, max_output_size=8)
    assert not lopt.needs_factors
    tx = lopt.optimizer(lopt.init(jax.random.key(0)))
    updates, _ = tx.update(jax.grad(loss)(params, ids, ids), tx.init(params), params)
    assert updates["table"].shape == (7, 9)


def test_every_element_is_as_often_in_the_subset():
    factors = Factors((jnp.arange(10.0)[:, None],), (100 + jnp.arange(10.0)[:, None], jnp.zeros((2, 3))))
    reader, counts = SetReader(max_set_size=4, decays=()), np.zeros(10)
    for step in range(600):
        chosen, _ = reader.advance(((), ()), factors, jnp.asarray(step))
        chosen = jax.tree.map(lambda x: x[0], chosen)
        index = np.asarray(chosen.activations[0][:, 0], int)
        assert len(set(index)) == 4
        np.testing.assert_array_equal(chosen.tangents[0][:, 0], 100 + index)
        assert chosen.tangents[1].shape == (2, 3)
        counts[index] += 1
    np.testing.assert_allclose(counts / 600, 0.4, atol=0.08)
    whole, _ = SetReader(decays=()).advance(((), ()), factors, jnp.asarray(0))
    assert whole.activations[0].shape == (1, 10, 1)


def test_a_bound_above_the_set_size_changes_nothing_and_one_below_keeps_less_state():
    structure, recorded = analyzed(MODEL), record(MODEL)
    whole, large, few = (reading(structure, max_set_size=size) for size in (None, 50, 5))
    phi = lively(whole)
    assert relative_difference(play(large, phi, recorded)[-1], play(whole, phi, recorded)[-1]) == 0
    assert relative_difference(play(few, phi, recorded)[-1], play(whole, phi, recorded)[-1]) > 1e-4
    state = few.optimizer(phi).init(MODEL[1])
    assert {leaf.shape[1] for leaf in jax.tree.leaves(state.residual.factors)} == {5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_set_size": 0}, "SetReader.max_set_size must be a whole number"),
        ({"max_output_size": True}, "SetReader.max_output_size must be a whole number"),
        ({"decays": (0.5, 1.0)}, "SetReader.decays must be at least 0 and below 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SetReader(**settings)
