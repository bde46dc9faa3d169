"""Learned optimizers respect the symmetries of models: hidden neurons may be permuted, and so may the set."""

import jax
import numpy as np
import permute
import pytest
from optimizing import analyzed, lively, mlp, play, record, relative_difference, residual, with_coefficients

from gmn_lopt import (
    UNF,
    Constant,
    Denoised,
    Factors,
    Feedback,
    GradMetaNetConfig,
    GradMetaNetPlusPlusConfig,
    LearnedOptimizer,
    Muon,
    Normalized,
    PointwiseMLP,
    Residual,
    ScaleFree,
    SetReader,
)

SMALL = GradMetaNetConfig(width=8, product_width=8, neuron_layers=2)
ATTENTION = GradMetaNetPlusPlusConfig(width=8, product_width=8, blocks=1, heads=2)
DS, UNIVERSAL = PointwiseMLP(8), UNF(8)
MODELS = {
    "one hidden layer": mlp(5, 7, 4),
    "two hidden layers": mlp(5, 7, 6, 4),
    "three hidden layers": mlp(5, 7, 6, 8, 4),
    "residual stream": residual(),
}


def reading(config=SMALL, network=DS, **settings):
    """The residual of a network that GradMetaNet adds features to."""
    return Residual(network=network, gradmetanet=SetReader(config, **settings))


RULES = {
    "sgdm": {},
    "ds": {"residual": Residual(network=DS)},
    "ds+gmn": {"residual": reading()},
    "unf": {"residual": Residual(network=UNIVERSAL)},
    "unf+gmn": {"residual": reading(network=UNIVERSAL)},
    "unf+gmn++": {"residual": reading(ATTENTION, UNIVERSAL)},
    "ds+gmn, no averages": {"residual": reading(decays=())},
    "ds, feedback": {"residual": Residual(network=DS), "step_size": Constant(0.1, feedback=Feedback())},
    "muon": {"residual": Residual(network=DS), "direction": Muon()},
    "ds+gmn, denoised, subset": {"residual": reading(max_set_size=5), "direction": Denoised()},
    "celo, muon": {"residual": Residual(ScaleFree(), DS), "rule": Normalized(), "direction": Muon()},
}

# Newton-Schulz enlarges small singular values, and the rounding in them, about a hundred times.
TOLERANCE = dict.fromkeys(list(RULES)[-3:], 2e-3)

CASES = [
    *((model, rule) for model in MODELS for rule in ("sgdm", "ds", "ds+gmn")),
    *((model, "unf") for model in ("one hidden layer", "three hidden layers")),
    *((model, "unf+gmn") for model in ("two hidden layers", "residual stream")),
    *((model, "unf+gmn++") for model in ("two hidden layers", "residual stream")),
    ("two hidden layers", "ds+gmn, no averages"),
    ("residual stream", "ds, feedback"),
    *((model, rule) for model in ("two hidden layers", "residual stream") for rule in list(RULES)[-3:]),
]


@pytest.mark.parametrize(("model", "rule"), CASES)
def test_permuting_hidden_neurons_permutes_the_update(model, rule):
    structure = analyzed(MODELS[model])
    assert any(s.permutable for s in structure.spaces)
    lopt = LearnedOptimizer(structure, **RULES[rule])
    phi, recorded = lively(lopt), record(MODELS[model])
    permutations = permute.draw(structure, 1)
    permuted = [
        (
            permute.parameters(structure, permutations, params),
            permute.parameters(structure, permutations, grads),
            permute.factors(structure, permutations, factors),
        )
        for params, grads, factors in recorded
    ]
    for update, reference in zip(play(lopt, phi, permuted), play(lopt, phi, recorded)):
        difference = relative_difference(update, permute.parameters(structure, permutations, reference))
        assert difference < TOLERANCE.get(rule, 2e-5)


def test_neurons_permuted_in_the_factors_alone_change_the_update():
    structure = analyzed(MODELS["two hidden layers"])
    lopt = LearnedOptimizer(structure, residual=reading())
    phi, recorded = lively(lopt), record(MODELS["two hidden layers"])
    permutations = permute.draw(structure, 1)
    for space in (1, 2):
        alone = [p if i == space else np.arange(len(p)) for i, p in enumerate(permutations)]
        other = [(p, g, permute.factors(structure, alone, f)) for p, g, f in recorded]
        assert relative_difference(play(lopt, phi, other)[-1], play(lopt, phi, recorded)[-1]) > 1e-2


def test_fixed_neurons_are_told_apart():
    """Inputs and outputs have positions: permuting them in parameters and factors does not permute the update."""
    structure = analyzed(MODELS["one hidden layer"])
    lopt = LearnedOptimizer(structure, residual=reading())
    phi, recorded = lively(lopt), record(MODELS["one hidden layer"], steps=1)
    for space in (0, 2):
        permutations = [np.roll(np.arange(s.size), 1 if i == space else 0) for i, s in enumerate(structure.spaces)]
        (params, grads, factors) = recorded[0]
        permuted = [
            (
                permute.parameters(structure, permutations, params),
                permute.parameters(structure, permutations, grads),
                permute.factors(structure, permutations, factors),
            )
        ]
        reference = permute.parameters(structure, permutations, play(lopt, phi, recorded)[0])
        assert relative_difference(play(lopt, phi, permuted)[0], reference) > 1e-3


def _reorder(factors, order):
    return jax.tree.map(lambda x: x[order], factors)


@pytest.mark.parametrize(
    ("model", "config"),
    [("two hidden layers", SMALL), ("three hidden layers", SMALL), ("two hidden layers", ATTENTION)],
)
def test_the_order_of_the_set_does_not_matter(model, config):
    structure = analyzed(MODELS[model])
    lopt = LearnedOptimizer(structure, residual=reading(config))
    phi, recorded = lively(lopt), record(MODELS[model])
    order = np.random.default_rng(0).permutation(structure.sites[0].set_size)
    reordered = [(p, g, _reorder(f, order)) for p, g, f in recorded]
    assert relative_difference(play(lopt, phi, reordered), play(lopt, phi, recorded)) < 1e-5
    # The elements of the set belong together across sites, and across steps.
    torn_sites = [(p, g, Factors(_reorder(f.activations, order), f.tangents)) for p, g, f in recorded]
    torn_steps = [(p, g, _reorder(f, np.roll(order, i))) for i, (p, g, f) in enumerate(recorded)]
    for torn in (torn_sites, torn_steps):
        assert relative_difference(play(lopt, phi, torn)[-1], play(lopt, phi, recorded)[-1]) > 1e-3


def test_the_network_decides_the_update():
    """Otherwise the tests above would compare momentum with momentum."""
    structure = analyzed(MODELS["two hidden layers"])
    lopt = LearnedOptimizer(structure, residual=reading())
    recorded, phi = record(MODELS["two hidden layers"]), lively(lopt)
    loud, quiet = play(lopt, phi, recorded)[-1], play(lopt, with_coefficients(phi, beta=1e-9), recorded)[-1]
    assert relative_difference(loud, quiet) > 1.0
