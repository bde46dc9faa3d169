"""Preconditioners of large models: which are due when, their moments against NumPy, and roots of a few inverses."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import transformers
from optimizing import mlp, relative_difference

import gmn_lopt
from gmn_lopt.optimizers.directions import moments, spreading
from gmn_lopt.optimizers.directions.denoised_layers import as_matrices, layer_groups, read_sets
from gmn_lopt.optimizers.directions.denoising import update_preconditioners
from gmn_lopt.optimizers.directions.preconditioners import MOMENTS_DECAY, init_preconditioner
from gmn_lopt.optimizers.directions.spreading import EARLY, EVERY, due, parts, put, take
from gmn_lopt.util.inverses import SHIFTS, WEIGHTS, inverse_root_of_inverses

MODELS = {
    "perceptron": lambda: mlp(40, 300, 200, 200, 200, 10),
    "transformer": lambda: transformers.plain(blocks=3),
    "scanned": functools.partial(transformers.plain, blocks=6, scan=True),
}


@pytest.fixture
def large(monkeypatch):
    """Small models are treated like large ones; layers of all sizes by themselves, as wide ones are."""
    monkeypatch.setattr(spreading, "SPREAD", 0.0)
    monkeypatch.setattr("gmn_lopt.optimizers.directions.denoised_layers.JOINED", 0)


def prepared(name):
    loss, params, batch = MODELS[name]()
    structure = gmn_lopt.analyze(loss, params, *batch)
    groups = layer_groups(structure, range(len(structure.parameters)))
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *batch)
    momenta = [as_matrices(group, structure.parameters, jax.tree.leaves(grads)) for group in groups]
    return groups, [read_sets(group, factors) for group in groups], momenta


@pytest.mark.parametrize("name", MODELS)
def test_small_models_have_one_turn_for_all(name):
    groups, _, _ = prepared(name)
    (turn,) = parts(groups)
    assert [part.group for part in turn] == list(groups)
    steps = np.arange(30)
    expected = (steps < EARLY) | (steps % EVERY == 0)
    np.testing.assert_array_equal([due(jnp.int32(t), 0, 1) for t in steps], expected)


@pytest.mark.parametrize("name", MODELS)
def test_five_steps_reach_every_matrix_once(name, large):
    groups, _, _ = prepared(name)
    turns = parts(groups)
    assert len(turns) == EVERY
    for of, number in (("activations", spreading._distinct), ("matrices", lambda group: len(group.reads))):
        seen = [(p.position, place) for turn in turns for p in turn for place in getattr(p, of)]
        everything = [(i, place) for i, group in enumerate(groups) for place in range(number(group))]
        assert sorted(seen) == everything
    # A part's matrices read its activations, as in the whole.
    for part in (part for turn in turns for part in turn):
        whole = groups[part.position]
        reads = [part.activations[place] for place in part.group.reads]
        assert reads == [whole.reads[place] for place in part.matrices]
    if name == "scanned":  # stacks are cut, so that turns cost about the same
        costs = [sum(map(spreading._cost, turn)) for turn in turns]
        assert max(costs) < 1.5 * sum(costs) / EVERY
    for step in range(EARLY, EARLY + 12):
        assert [bool(due(jnp.int32(step), turn, EVERY)) for turn in range(EVERY)].count(True) == 1


@pytest.mark.parametrize("name", MODELS)
def test_moments_and_roots_are_those_of_the_steps_at_which_each_matrix_was_due(name, large):
    """Against moving averages of each matrix in float64, and what small models' preconditioners are of them."""
    groups, sets, momenta = prepared(name)
    random, state = np.random.default_rng(0), tuple(map(init_preconditioner, groups))
    update = jax.jit(lambda state, sets, step: update_preconditioners(state, groups, sets, momenta, step))
    scale = lambda s, by: tuple(a * by if jnp.issubdtype(a.dtype, jnp.floating) else a for a in s)  # noqa: E731
    history = []
    for t in range(18):
        by = random.uniform(0.5, 2.0, 2)
        history.append(by)
        state = update(state, [(scale(a, by[0]), scale(g, by[1])) for a, g in sets], jnp.int32(t))
    # Of activations by which all neurons are multiplied, without a bias, the second moment is multiplied by its square.
    once = update(tuple(map(init_preconditioner, groups)), sets, jnp.int32(0))
    for turn, members in enumerate(parts(groups)):
        times = [t for t in range(18) if t < EARLY or t % EVERY == turn]
        weights = MOMENTS_DECAY ** np.arange(len(times))[::-1]
        weights /= weights.sum()
        squares = np.array([history[t] for t in times]).astype(np.float64) ** 2
        for part in members:
            whole, first = state[part.position], once[part.position]
            noise = weights @ squares[:, 1] * take(first.noise, part.matrices)
            np.testing.assert_allclose(take(whole.noise, part.matrices), noise, rtol=1e-4, atol=1e-12)
            if part.group.reads_neurons and all(layer.bias is None for layer in part.group.layers):
                moment = weights @ squares[:, 0] * take(first.activation, part.activations)
                np.testing.assert_allclose(take(whole.activation, part.activations), moment, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_spread_and_unspread_agree_where_all_is_due(name, large, monkeypatch):
    groups, sets, momenta = prepared(name)
    start = tuple(map(init_preconditioner, groups))
    spread = update_preconditioners(start, groups, sets, momenta, jnp.int32(3))
    monkeypatch.setattr(spreading, "SPREAD", np.inf)
    together = update_preconditioners(start, groups, sets, momenta, jnp.int32(3))
    for a, b in zip(spread, together):
        assert relative_difference(a._replace(root=jnp.ones(1)), b._replace(root=jnp.ones(1))) < 1e-4


def test_what_is_not_due_is_left_alone_and_runs_under_vmap(large):
    groups, sets, momenta = prepared("scanned")
    start = update_preconditioners(tuple(map(init_preconditioner, groups)), groups, sets, momenta, jnp.int32(0))
    momenta = [1.5 * momentum for momentum in momenta]
    new = update_preconditioners(start, groups, sets, momenta, jnp.int32(EARLY + 1))
    members = {(part.position, place) for part in parts(groups)[1] for place in part.matrices}
    for i, (a, b) in enumerate(zip(start, new)):
        changed = [not np.array_equal(x, y) for x, y in zip(a.root, b.root)]
        assert changed == [(i, place) in members for place in range(len(changed))]
    two = jax.tree.map(lambda x: jnp.stack([x, x]), (start, momenta))
    many = jax.vmap(lambda old, m: update_preconditioners(old, groups, sets, m, jnp.int32(EARLY + 1)))(*two)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], many), new, rtol=1e-5, atol=1e-6)


def test_some_rows_are_different_ones_each_time_and_all_in_turn(monkeypatch):
    monkeypatch.setattr(moments, "ROWS", 10)
    rows = jnp.arange(47.0)[None, :, None]
    seen = [np.asarray(moments._some_rows(rows, jnp.int32(t)))[0, :, 0] for t in range(7)]
    assert {len(set(chosen)) for chosen in seen} == {11} and set(np.concatenate(seen)) == set(range(47))
    assert moments._some_rows(rows[:, :19], jnp.int32(3)).shape == (1, 19, 1)


def test_moments_of_some_rows_are_those_of_the_set_on_average(large, monkeypatch):
    groups, sets, momenta = prepared("transformer")
    start = tuple(map(init_preconditioner, groups))
    whole = update_preconditioners(start, groups, sets, momenta, jnp.int32(0))
    size = sets[0][1][0].shape[0]
    monkeypatch.setattr(moments, "ROWS", size // 2)
    # The first two times it is each half, weighted by 0.95 and 1.
    state = start
    for t in range(2):
        state = update_preconditioners(state, groups, sets, momenta, jnp.int32(t))
    for some, all_of_it in zip(state, whole):
        assert relative_difference(some.noise, all_of_it.noise) < 0.1
        assert relative_difference(some.activation, all_of_it.activation) < 0.1


def test_poles_are_those_of_elliptic_functions():
    least, number = 1e-5, len(SHIFTS)
    period = scipy.special.ellipk(1 - least)
    sn, cn, dn, _ = scipy.special.ellipj((np.arange(number) + 0.5) * period / number, 1 - least)
    np.testing.assert_allclose(SHIFTS, least * (sn / cn) ** 2, rtol=1e-6)
    np.testing.assert_allclose(WEIGHTS, 2 * period * least**0.5 / (np.pi * number) * dn / cn**2, rtol=1e-6)
    x = np.geomspace(least, 1, 1000)
    found = sum(c / (x + s) for s, c in zip(SHIFTS, WEIGHTS))
    assert np.abs(found * np.sqrt(x) - 1).max() < 0.017


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e10])
def test_roots_of_a_few_inverses_are_those_of_a_decomposition(size):
    random = np.random.default_rng(0)
    factors, others = random.normal(size=(2, 2, 40, 80))
    gram, metric = (x @ x.transpose(0, 2, 1) for x in (factors, others))
    bound = np.trace(np.linalg.solve(metric, gram), axis1=1, axis2=2)

    def literal(matrix):
        values, vectors = np.linalg.eig(matrix)
        return (vectors * values[..., None, :] ** -0.5 @ np.linalg.inv(vectors)).real

    found = inverse_root_of_inverses(*(jnp.float32(x) for x in (size * gram, size * bound, metric)))
    expected = literal(np.linalg.solve(metric, gram))
    assert relative_difference(found * np.sqrt(size), expected) < 0.03
    found = inverse_root_of_inverses(jnp.float32(size * gram), jnp.float32(size * np.trace(gram, axis1=1, axis2=2)))
    assert relative_difference(found * np.sqrt(size), literal(gram)) < 0.03
    nothing = inverse_root_of_inverses(jnp.zeros((1, 40, 40)), jnp.zeros(1))
    assert jnp.isfinite(nothing).all()


@pytest.mark.parametrize("places", [(0, 1, 2, 3), (1, 2), (0, 2, 3), (3,)])
def test_taken_values_are_put_back(places):
    values = jnp.arange(8.0).reshape(4, 2)
    np.testing.assert_array_equal(take(values, places), values[np.array(places)])
    expected = values.at[np.array(places)].multiply(2.0)
    np.testing.assert_array_equal(put(values, places, 2 * take(values, places)), expected)


def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_been_interrupted(large):
    loss, params, batch = MODELS["perceptron"]()
    tx = gmn_lopt.load("default", gmn_lopt.analyze(loss, params, *batch))
    step = jax.jit(lambda p, s, g, f: tx.update(g, s, p, factors=f))
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *batch)
    state, kept = tx.init(params), None
    for t in range(EARLY + 6):
        kept = jax.tree.map(np.asarray, state) if t == EARLY + 3 else kept
        updates, state = step(params, state, grads, factors)
    for _ in range(3):
        again, kept = step(params, kept, grads, factors)
    chex.assert_trees_all_equal((again, kept), (updates, state))
