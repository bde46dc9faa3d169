"""Estimators of the empirical Fisher matrix against the dense gradients of all examples."""

import convolutions
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import transformers

import gmn_lopt
from gmn_lopt.curvature import examples as examples_


def weight_normalised():
    """A kernel that is computed from two leaves."""
    loss, params, args = models.jnp_mlp(jnp.tanh)
    params[1]["scale"] = jnp.linspace(0.5, 1.5, params[1]["w"].shape[1])

    def normalised(params, *args):
        w = params[1]["w"]
        kernel = w / jnp.linalg.norm(w, axis=0) * params[1]["scale"]
        return loss([params[0], {"w": kernel, "b": params[1]["b"]}, *params[2:]], *args)

    return normalised, params, args


def penalised():
    """A penalty on all weights, so that factors give a part of the gradient."""
    loss, params, args = models.jnp_mlp(jnp.tanh)
    penalty = lambda params: 0.1 * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))  # noqa: E731
    return lambda params, *args: loss(params, *args) + penalty(params), params, args


MODELS = {
    **{name: models.MODELS[name] for name in ("jnp relu", "flax.nnx", "tied autoencoder", "sequence")},
    "weight normalisation": weight_normalised,
    "penalty": penalised,
    "transformer": lambda: transformers.plain(transformers.per_head, blocks=1),
    "transformer, tied": lambda: transformers.plain(tied=True, blocks=1),
    "transformer, scanned": lambda: transformers.plain(scan=True),
    **{f"conv: {name}": convolutions.CONVOLUTIONS[name] for name in ("strided", "grouped", "scanned")},
}


def dense_gradients(loss, params, batch):
    """``[N, P]``, by the Jacobian of the losses of all examples."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def losses(flat):
        return jax.vmap(lambda *example: loss(unravel(flat), *(x[None] for x in example)))(*batch)

    return np.asarray(jax.jit(jax.jacobian(losses))(flat), np.float64)


CASES = [*((name, 1) for name in MODELS), ("jnp relu", 2**22)]


@pytest.mark.parametrize(("name", "entries"), CASES)
def test_agrees_with_the_gradients_of_all_examples(name, entries, monkeypatch):
    monkeypatch.setattr(examples_, "ENTRIES", entries)  # with one entry, the examples are taken one by one
    loss, params, batch = MODELS[name]()
    g = dense_gradients(loss, params, batch)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    vector = jax.random.normal(jax.random.key(1), flat.shape)

    @jax.jit
    def estimate(params, vector):
        diagonal = gmn_lopt.fisher_diagonal(loss, params, *batch)
        product = gmn_lopt.empirical_fisher_vector_product(loss, params, *batch)(vector)
        return diagonal, gmn_lopt.fisher_trace(loss, params, *batch), product

    diagonal, trace, product = estimate(params, unravel(vector))
    assert jax.tree.structure(diagonal) == jax.tree.structure(product) == jax.tree.structure(params)
    expected = (g**2).mean(0)
    found = jax.flatten_util.ravel_pytree(diagonal)[0]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 * expected.max())
    np.testing.assert_allclose(trace, expected.sum(), rtol=1e-4)
    expected = g.T @ (g @ np.asarray(vector, np.float64)) / len(g)
    found = jax.flatten_util.ravel_pytree(product)[0]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5 * np.abs(expected).max())


def test_examples_that_do_not_fill_the_last_chunk_count_once(monkeypatch):
    loss, params, (x, labels) = models.jnp_mlp()
    batch = x[:7], labels[:7]
    expected = (dense_gradients(loss, params, batch) ** 2).mean(0)
    biases = sum(p["b"].size for p in params)
    monkeypatch.setattr(examples_, "ENTRIES", 3 * biases)
    found = gmn_lopt.fisher_diagonal(loss, params, *batch)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(found)[0], expected, rtol=1e-4, atol=1e-6)


def wide(examples=32):
    """1,024-wide layers: the gradients of all examples would be large."""
    params = {"w": jnp.zeros((256, 512)), "v": jnp.zeros((512, 256))}
    loss = lambda p, x: jnp.mean(jnp.tanh(x @ p["w"]) @ p["v"])  # noqa: E731
    return loss, params, jnp.zeros((examples, 256))


@pytest.mark.parametrize("name", ["diagonal", "trace", "product"])
def test_no_gradient_of_an_example_is_kept(name):
    loss, params, x = wide()
    functions = {
        "diagonal": lambda p, x: gmn_lopt.fisher_diagonal(loss, p, x),
        "trace": lambda p, x: gmn_lopt.fisher_trace(loss, p, x),
        "product": lambda p, x: gmn_lopt.empirical_fisher_vector_product(loss, p, x)(p),
    }
    entries = sum(p.size for p in params.values())
    naive = jax.jit(lambda p, x: jax.vmap(jax.grad(loss), (None, 0))(p, x[:, None])).lower(params, x).compile()
    assert naive.memory_analysis().output_size_in_bytes >= 4 * len(x) * entries
    used = jax.jit(functions[name]).lower(params, x).compile().memory_analysis().temp_size_in_bytes
    assert used < 4 * 3 * entries


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ((jnp.ones((4, 7)), jnp.ones((3,), jnp.int32)), "batch[0] has 4, batch[1] has 3"),
        ((jnp.ones((4, 7)), jnp.ones(())), "batch[1] is no array with examples in front"),
        ((jnp.ones((0, 7)), jnp.ones((0,), jnp.int32)), "the batch has no example"),
        ((), "the batch has no example"),
    ],
)
def test_impossible_batches_are_refused(batch, says):
    loss, params, _ = models.jnp_mlp()
    for estimator in (gmn_lopt.fisher_diagonal, gmn_lopt.fisher_trace, gmn_lopt.empirical_fisher_vector_product):
        with pytest.raises(gmn_lopt.StructureError) as error:
            estimator(loss, params, *batch)
        assert says in str(error.value) and "\n" not in str(error.value)


def test_other_vectors_are_refused():
    loss, params, batch = models.jnp_mlp()
    product = gmn_lopt.empirical_fisher_vector_product(loss, params, *batch)
    with pytest.raises(gmn_lopt.StructureError, match="not a tree like the parameters"):
        product(params[:1])
    with pytest.raises(gmn_lopt.StructureError, match=r"\[0\]\['b'\] of shape \(1,\)"):
        product([{**params[0], "b": jnp.ones(1)}, *params[1:]])
