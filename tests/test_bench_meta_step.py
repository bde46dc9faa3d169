"""The benchmark of the meta-step: its reference makes the library's updates, its table is filled."""

import sys
from pathlib import Path

import jax
import pytest
from optimizing import analyzed, lively, mlp, play, record, relative_difference

import meta_train
from gmn_lopt import GradMetaNetConfig, LearnedOptimizer

sys.path.append(str(Path(meta_train.__file__).parent / "bench"))

from straightforward import Straightforward

SMALL = GradMetaNetConfig(width=6, set_layers=2, product_width=5, max_set_size=7)
MODEL = mlp(5, 7, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"gradmetanet": None},
        {"gradmetanet": GradMetaNetConfig(width=6, product_width=5, neuron_layers=2)},
        {"gradmetanet": SMALL, "base": "whitened", "width": 8, "hidden_layers": 2, "gate": True},
        {"gradmetanet": None, "base": "muon", "gate": True},
    ],
)
def test_straightforward_makes_the_same_updates(options):
    lopt = LearnedOptimizer(analyzed(MODEL), **options)
    phi, recorded = lively(lopt), record(MODEL)
    tx, plain = lopt.optimizer(phi), Straightforward(lopt).optimizer(phi)
    state = plain.init(recorded[0][0])
    update = jax.jit(plain.update)
    for expected, (params, grads, factors) in zip(play(lopt, phi, recorded), recorded):
        step, state = update(grads, state, params, factors=factors)
        assert relative_difference(step, expected) < 1e-4
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(recorded[0][0]))


def test_straightforward_refuses_what_it_does_not_do():
    with pytest.raises(ValueError, match="additive"):
        Straightforward(LearnedOptimizer(analyzed(MODEL), rule="normalized"))
