"""Large outputs, which GradMetaNet leaves out."""

import dataclasses

import jax
import pytest
import transformers
from optimizing import BATCH, analyzed, lively, mlp, play, record, relative_difference

from gmn_lopt import GradMetaNetConfig, LearnedOptimizer, analyze
from gmn_lopt.optimizers.output_sites import without_large_outputs

SMALL = GradMetaNetConfig(width=4, set_layers=1, product_width=4, out_features=3)


def test_only_outputs_that_are_fixed_and_too_large_are_left_out():
    loss, params, args = transformers.plain(tied=False, blocks=1)
    structure = analyze(loss, params, *args)
    assert without_large_outputs(structure, None) is structure
    assert without_large_outputs(structure, transformers.VOCABULARY) is structure
    smaller = without_large_outputs(structure, 1)
    gone = [site for site in structure.sites if site not in smaller.sites]
    assert [(site.kind, site.size) for site in gone] == [("output", transformers.VOCABULARY)]
    # Queries and keys are only written as well, but no more fixed than any hidden neuron.
    permutable = [s for s in smaller.sites if s.kind == "output"]
    assert permutable and all(any(structure.spaces[i].permutable for i in s.spaces) for s in permutable)
    # Every parameter keeps its other site, which is the same as before.
    for old, new in zip(structure.parameters, smaller.parameters, strict=True):
        left = [(structure.sites[ref.site], ref.dims) for ref in old.sites if structure.sites[ref.site] not in gone]
        assert [(smaller.sites[ref.site], ref.dims) for ref in new.sites] == left


@pytest.mark.parametrize("heads", [0, 2])
def test_no_state_and_no_features_come_of_a_large_output(heads):
    model = mlp(5, 4, 9)
    structure = analyzed(model)
    make = lambda largest: LearnedOptimizer(  # noqa: E731
        structure,
        width=8,
        gradmetanet=dataclasses.replace(SMALL, max_output_size=largest, attention_heads=heads),
    )
    whole, some = make(9), make(8)
    phi, recorded = lively(whole), record(model)
    state = some.optimizer(phi).init(model[1])
    activations, tangents = state.factor_averages
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
    assert LearnedOptimizer(structure, gradmetanet=SMALL).needs_factors
    lopt = LearnedOptimizer(structure, gradmetanet=dataclasses.replace(SMALL, max_output_size=8))
    assert not lopt.needs_factors
    tx = lopt.optimizer(lopt.init(jax.random.key(0)))
    updates, _ = tx.update(jax.grad(loss)(params, ids, ids), tx.init(params), params)
    assert updates["table"].shape == (7, 9)
