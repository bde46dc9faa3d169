"""Predictors of curvature: standardised inputs, the symmetries they keep, their files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import permute
import pytest

import gmn_lopt
from gmn_lopt.networks import InvariantGradMetaNet, init_gradmetanet
from gmn_lopt.networks.site_features import EPSILON
from gmn_lopt.util.errors import FileError

CONFIGS = {
    "gradmetanet": gmn_lopt.GradMetaNetConfig(width=6, product_width=5),
    "gradmetanet++": gmn_lopt.GradMetaNetPlusPlusConfig(width=4, blocks=1, heads=2, product_width=5),
}


def summed(params, x):
    return jnp.sum(jnp.sin(x @ params["w"] + params["b"]) @ params["v"])


def network(width=5, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {"b": (width,), "v": (width, 2), "w": (3, width)}
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, params.items())}
    x = jax.random.normal(keys[3], (7, 3))
    structure = gmn_lopt.analyze(summed, params, x)
    return structure, params, x, gmn_lopt.value_grad_and_factors(summed)(params, x)[2]


def predictor(name, residual=False):
    structure, params, _, factors = network()
    made = gmn_lopt.FisherPredictor(CONFIGS[name], residual)
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), factors)
    targets = jax.tree.map(lambda x: jnp.stack([x**2, 3 * x]), params)
    weights = made.init(jax.random.key(1), structure, several, targets)
    noise = lambda x: x + 0.2 * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32)  # noqa: E731
    return made, structure, weights | {"network": jax.tree.map(noise, weights["network"])}, factors


def test_standardised_factors_have_mean_0_and_deviation_1_over_the_training_set():
    factors = gmn_lopt.Factors(
        (jax.random.normal(jax.random.key(0), (20, 4, 3)) * 5 + 2,), (jnp.full((20, 4, 1), 3.0),)
    )
    found = gmn_lopt.standardize(gmn_lopt.fit_standardization(factors), factors)
    np.testing.assert_allclose((found.activations[0].mean(), found.activations[0].std()), (0, 1), atol=1e-5)
    np.testing.assert_array_equal(found.tangents[0], 0.0)  # constant: no division by rounding


@pytest.mark.parametrize("name", CONFIGS)
def test_without_normalisation_a_network_reads_what_it_is_given(name):
    structure, _, _, factors = network()
    channel = jax.tree.map(lambda x: x[None], factors)
    scaled = jax.tree.map(lambda x: x / jnp.sqrt((x**2).mean() + EPSILON), channel)
    for module in (CONFIGS[name].module(structure), InvariantGradMetaNet(structure, CONFIGS[name])):
        weights = init_gradmetanet(module, jax.random.key(0))
        normalised = module.apply({"params": weights}, channel)
        plain = module.clone(normalize=False)
        same, other = (plain.apply({"params": weights}, x) for x in (scaled, channel))
        for a, b, c in zip(*map(jax.tree.leaves, (normalised, same, other)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
            assert np.abs(a - c).max() > 1e-3


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_predictions_move_with_the_neurons_and_not_with_the_set(name, residual):
    made, structure, weights, factors = predictor(name, residual)
    predict = jax.jit(lambda f: made.predict(structure, weights, f))
    found = predict(factors)
    permutations = permute.draw(structure, 3)
    moved = predict(permute.factors(structure, permutations, factors))
    reordered = predict(jax.tree.map(lambda x: x[::-1], factors))
    expected = permute.parameters(structure, permutations, found)
    for a, b in ((moved, expected), (reordered, found)):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3)


def test_the_residual_is_on_the_standard_estimator():
    made, structure, weights, factors = predictor("gradmetanet", residual=True)
    zero = jax.tree.map(jnp.zeros_like, weights["network"])
    _, params, x, _ = network()
    expected = gmn_lopt.fisher_diagonal(summed, params, x)
    found = made.predict(structure, weights | {"network": zero}, factors)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def saved(tmp_path):
    made, structure, weights, factors = predictor("gradmetanet", residual=True)
    gmn_lopt.save_predictor(tmp_path / "p", made, structure, weights)
    return tmp_path / "p", made.predict(structure, weights, factors), factors


def test_a_loaded_predictor_predicts_the_same_also_for_wider_networks(saved):
    path, expected, factors = saved
    found = gmn_lopt.load_predictor(path, network()[0])(factors)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    structure, params, _, factors = network(width=9)
    wider = gmn_lopt.load_predictor(path, structure)(factors)
    assert jax.tree.map(jnp.shape, wider) == jax.tree.map(jnp.shape, params)


def test_impossible_files_are_refused_in_one_line(saved, tmp_path):
    path, _, _ = saved
    structure = network()[0]
    deeper = lambda p, x: jnp.sum(jnp.sin(jnp.sin(x @ p["a"]) @ p["b"]) @ p["c"])  # noqa: E731
    shapes = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 1))}
    other = gmn_lopt.analyze(deeper, shapes, jnp.ones((7, 3)))
    config = json.loads((path / "config.json").read_text())

    def refused(says, where=path, of=structure):
        with pytest.raises(FileError, match=says) as error:
            gmn_lopt.load_predictor(where, of)
        assert "\n" not in str(error.value)

    refused("nowhere.* is missing", tmp_path / "nowhere")
    refused("belongs to a model of other layers", of=other)
    (path / "config.json").write_text(json.dumps(config | {"version": 9}))
    refused("has format version 9, this gmn_lopt reads version 2: install the gmn_lopt that wrote it")
    (path / "config.json").write_text(json.dumps(config | {"format": "other"}))
    refused("does not describe a Fisher predictor")
    (path / "config.json").write_text(json.dumps(config | {"predictor": config["predictor"] | {"residual": False}}))
    refused("are not what was saved")
    (path / "config.json").write_text(json.dumps(config | {"predictor": {"name": "Other"}}))
    refused("predictor must be one of FisherPredictor")
    (path / "config.json").write_text(json.dumps(config))
    weights = (path / "weights.safetensors").read_bytes()
    (path / "weights.safetensors").write_bytes(weights[:-1] + b"x")
    refused("is damaged")
    (path / "weights.safetensors").unlink()
    refused("is missing")
    (tmp_path / "full").mkdir()
    with pytest.raises(FileError, match="is not a saved predictor"):
        gmn_lopt.save_predictor(tmp_path / "full", predictor("gradmetanet")[0], structure, {})


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    made, structure, weights, _ = predictor("gradmetanet")
    bad = jax.tree.map(lambda x: x * jnp.nan, weights)
    with pytest.raises(FileError, match=r"cannot save .*p: weights holds .* with values that are not finite"):
        gmn_lopt.save_predictor(tmp_path / "p", made, structure, bad)
    assert not (tmp_path / "p").exists()
