"""What a step of ``default`` may cost: bytes of state, sizes of matrices, operations to compile, and no LAPACK."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from optimizing import mlp

import gmn_lopt
from gmn_lopt.optimizers.directions.blocks import LARGEST, SMALL
from gmn_lopt.optimizers.directions.denoised_layers import layer_groups
from gmn_lopt.util.inverses import in_stacks, inverse, inverse_root


def dense(*widths, bias=True, batch=4):
    """A linear network, its parameters zeros, which no one has to draw."""
    params = [{"w": jnp.zeros((m, n))} | ({"b": jnp.ones(n)} if bias else {}) for m, n in itertools.pairwise(widths)]

    def loss(params, x):
        for layer in params:
            x = x @ layer["w"] + layer.get("b", 1.0)
        return jnp.mean(x**2)

    return loss, params, (jax.random.normal(jax.random.key(0), (batch, widths[0])),)


MODELS = {
    "square": lambda: dense(8, 8),
    "square, no bias": lambda: dense(8, 8, bias=False),
    "one output": lambda: dense(128, 128, 1),
    "only one output": lambda: dense(300, 1),
    "one input": lambda: dense(1, 300),
    "images": lambda: dense(192, 32, 32, 10),
    "MNIST": lambda: dense(784, 128, 10),
    "small": lambda: mlp(32, 32, 10),
    "narrowing": lambda: dense(4000, 512),
    "widening": lambda: dense(64, 4000),
    "wide": lambda: dense(30_000, 64),
    "wider": lambda: dense(150_528, 16),
    "transformer": lambda: transformers.plain(),
    "scanned": lambda: transformers.plain(scan=True, blocks=3),
}


def state_bytes(tx, params):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))


@pytest.mark.parametrize("name", MODELS)
def test_the_state_is_at_most_three_times_adam_s_but_for_small_layers(name):
    loss, params, batch = MODELS[name]()
    structure = gmn_lopt.analyze(loss, params, *batch)
    groups = layer_groups(structure, range(len(structure.parameters)))
    # Steps, what the feedback keeps for each tensor, and a few numbers for each kernel.
    scalars = 2 + 4 * len(structure.parameters) + 6 * sum(len(group.reads) for group in groups)
    ours = state_bytes(gmn_lopt.load("default", structure), params)
    # Layers of few inputs have whole matrices: two of the activations, two of the smaller side.
    small = [(group.inputs, len(group.reads)) for group in groups if group.inputs <= SMALL]
    whole = sum(count * 4 * n * n for n, count in small)
    assert ours <= 3 * state_bytes(optax.adam(1e-3), params) + 4 * (scalars + whole)
    assert all(group.rows <= LARGEST for group in groups)


def test_layers_that_are_square_or_widen_are_left_whole():
    for model in (dense(64, 64, 64), dense(32, 64, 64, 128), dense(1024, 1024), transformers.plain()):
        structure = gmn_lopt.analyze(model[0], model[1], *model[2])
        for group in layer_groups(structure, range(len(structure.parameters))):
            assert group.diagonal or group.blocks == 1


@pytest.mark.parametrize("widths", [(30_000, 64), (150_528, 16)])
def test_steps_of_very_wide_layers_are_finite_and_of_the_right_size(widths):
    loss, params, batch = dense(*widths)
    tx = gmn_lopt.load("default", gmn_lopt.analyze(loss, params, *batch), learning_rate=0.1)

    @jax.jit
    def step(params, state):
        _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *batch)
        updates, state = tx.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), updates

    after, updates = step(params, tx.init(params))
    change = batch[0] @ updates[0]["w"] + updates[0]["b"]
    # Blocks that do not know of each other add up where the batch is smaller than the layer is wide.
    assert 0.02 < jnp.sqrt(jnp.mean(change**2)) < 10
    assert jnp.isfinite(loss(after, *batch))


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 33), (4, 64), (1, 129)])
def test_inverses_are_about_as_accurate_as_cholesky(shape):
    count, n = shape
    rng = np.random.default_rng(0)
    rows = np.abs(rng.normal(size=(count, 2 * n, n)))  # of one sign: one large eigenvalue
    matrices = np.einsum("ksi,ksj->kij", rows, rows) / np.mean(rows**2) / 2 / n + 0.5 * np.eye(n)
    expected = np.linalg.inv(matrices)
    found = inverse(jnp.asarray(matrices, jnp.float32))
    factor = jax.scipy.linalg.cho_factor(jnp.asarray(matrices, jnp.float32), lower=True)
    cholesky = jax.vmap(lambda c: jax.scipy.linalg.cho_solve((c, True), jnp.eye(n)))(factor[0])
    assert np.abs(found - expected).max() <= 10 * np.abs(cholesky - expected).max() + 1e-6


def test_stacks_of_several_sizes_are_those_of_each_by_itself():
    rng = np.random.default_rng(0)
    stacks = []
    for count, n in ((2, 5), (1, 100), (3, 64), (1, 61), (1, 1)):
        rows = rng.normal(size=(count, n, n))
        stacks.append(jnp.asarray(rows @ rows.swapaxes(1, 2) + np.eye(n), jnp.float32))
    seen = []
    results = in_stacks(lambda stack, members: (seen.append(tuple(members)), inverse_root(stack))[1], stacks)
    assert sorted(itertools.chain(*seen)) == [0, 1, 2, 3, 4] and len(seen) < 5
    for stack, result in zip(stacks, results):
        np.testing.assert_allclose(result, inverse_root(stack), rtol=1e-3, atol=1e-4)


def lowered(tx, loss, params, batch):
    structure = gmn_lopt.analyze(loss, params, *batch)
    factors = [tuple(map(jnp.zeros, s)) for s in (structure.activation_shapes, structure.tangent_shapes)]
    update = jax.jit(lambda g, s, p, f: tx.update(g, s, p, factors=gmn_lopt.Factors(*f)))
    return update.lower(params, tx.init(params), params, factors).as_text()


def test_nine_layers_of_distinct_widths_are_a_program_of_bounded_size():
    """Before inverses and roots were loops that layers share this had 5,091 lines, and a Cholesky for each layer."""
    loss, params, batch = mlp(40, 72, 96, 56, 120, 88, 64, 104, 48, 10)
    text = lowered(gmn_lopt.load("default", gmn_lopt.analyze(loss, params, *batch)), loss, params, batch)
    assert len(text.splitlines()) < 3300
    # Reductions are what compiles slowest on a processor.
    assert text.count("stablehlo.reduce(") < 60
    assert "lapack" not in text and "cholesky" not in text and "triangular" not in text


def test_inverses_are_accurate_where_a_bias_has_a_larger_activation_than_all_others():
    matrix = 0.5 * np.eye(65) + 1e-3 * np.ones((65, 65))
    matrix[-1, -1] = 65.4
    got = inverse(jnp.asarray(matrix[None], jnp.float32))[0]
    np.testing.assert_allclose(got, np.linalg.inv(matrix), rtol=1e-5, atol=1e-6)
