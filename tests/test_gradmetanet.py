"""GradMetaNet against a literal transcription of its definition, and its positional encodings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizing import analyzed, mlp, residual

from gmn_lopt import Factors, GradientStructure
from gmn_lopt.factors.structure import Site, Space
from gmn_lopt.networks import (
    UNF,
    GradMetaNet,
    GradMetaNetConfig,
    GradMetaNetPlusPlusConfig,
    InvariantGradMetaNet,
    PointwiseMLP,
    init_gradmetanet,
)
from gmn_lopt.networks.encoding import ENCODING_FEATURES, encode_sites

CHANNELS = 3
CONFIG = GradMetaNetConfig(width=6, set_layers=3, neuron_layers=2, product_width=5, out_features=4)
MODELS = {"mlp": mlp(5, 7, 6, 4), "residual": residual()}


def relu(x):
    return np.maximum(x, 0.0)


class Reference:
    """Section 5 of the paper in numpy and float64, site by site, nothing folded, hoisted or shared."""

    def __init__(self, structure, weights, config):
        self.structure, self.config = structure, config
        self.w = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)

    def copies(self, values, with_sets):
        """For each site the mean over the sites of the same neurons (and, with sets, of the same set), or zeros."""
        result = []
        for a, x in zip(self.structure.sites, values):
            same = [
                y
                for b, y in zip(self.structure.sites, values)
                if b.spaces == a.spaces and (not with_sets or b.set_axes == a.set_axes)
            ]
            result.append(np.mean(same, axis=0) if len(same) > 1 else np.zeros_like(x))
        return result

    def set_layer(self, xs, m1, m2, m3, m4, m5, c):
        everything = np.concatenate([x.mean(0) for x in xs]).mean(0)
        copies = self.copies(xs, with_sets=True)
        ys = []
        for site, x, copy in zip(self.structure.sites, xs, copies):
            companions = [y for s, y in zip(self.structure.sites, xs) if s.set_axes == site.set_axes]
            over_neurons = np.concatenate(companions, axis=1).mean(1)
            y = x @ m1 + (x.mean(0) @ m2)[None] + (over_neurons @ m3)[:, None] + everything @ m4 + copy @ m5 + c
            ys.append(relu(y))
        return ys

    def neurons(self, factors):
        w, xs = self.w["trunk"], []
        for site, encoding in zip(self.structure.sites, encode_sites(self.structure)):
            a = None if site.activation is None else factors.activations[site.activation]
            g = None if site.tangent is None else factors.tangents[site.tangent]
            slots = [g if a is None else a, a if g is None else g]
            x = np.concatenate([np.moveaxis(np.asarray(slot, np.float64), 0, -1) for slot in slots], axis=-1)
            x = x / np.sqrt((x**2).mean((0, 1)) + 1e-5)
            xs.append(np.concatenate([x, np.broadcast_to(encoding, (x.shape[0], *encoding.shape))], axis=-1))
        first = w["set_layers_0"]
        none = np.zeros_like(first["encoding"])
        xs = self.set_layer(
            xs,
            np.concatenate([first["own"], first["encoding"]]),
            np.concatenate([first["set_mean"], none]),
            np.concatenate([first["neuron_mean"], first["encoding_mean"]]),
            np.concatenate([first["full_mean"], none]),
            np.concatenate([first["copies_mean"], none]),
            first["bias"],
        )
        for i in range(1, self.config.set_layers):
            names = ("own", "set_mean", "neuron_mean", "full_mean", "copies_mean", "bias")
            xs = self.set_layer(xs, *(w[f"set_layers_{i}"][name] for name in names))
        everything = np.concatenate([x.mean(0) for x in xs]).mean(0)
        hs = [relu((x @ w["pool"]).mean(0) + everything @ w["pool_full_mean"] + w["pool_bias"]) for x in xs]
        for i in range(self.config.neuron_layers):
            own, mean, copied, bias = (w[f"neuron_{i}_{name}"] for name in ("own", "mean", "copies_mean", "bias"))
            everything, copies = np.concatenate(hs).mean(0), self.copies(hs, with_sets=False)
            hs = [relu(h @ own + everything @ mean + copy @ copied + bias) for h, copy in zip(hs, copies)]
        return hs

    def parameter(self, parameter, hs):
        """Entry by entry: look up the neurons that the entry belongs to, and apply the perceptron to them."""
        if not parameter.sites:
            return None
        w = self.w["product"]
        axes = len(parameter.sites)
        roles = ("write",) if axes == 1 else ("read", "write")
        kernel = np.concatenate([w[f"axes{axes}_{name}"] for name in roles])
        result = np.zeros((*parameter.cut_shape, self.config.out_features))
        for index in np.ndindex(*parameter.cut_shape):
            inputs = []
            for ref in parameter.sites:
                sizes = [self.structure.spaces[s].size for s in self.structure.sites[ref.site].spaces]
                inputs.append(hs[ref.site][np.ravel_multi_index([index[d] for d in ref.dims], sizes)])
            hidden = relu(np.concatenate(inputs) @ kernel + w[f"axes{axes}_bias"])
            result[index] = hidden @ w[f"axes{axes}_out"] + w[f"axes{axes}_out_bias"]
        return result.reshape(*parameter.shape, -1)


def lively_weights(module, seed=0):
    rng = np.random.default_rng(seed)
    weights = init_gradmetanet(module, jax.random.key(seed))
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape) * 0.2, jnp.float32), weights)


def random_factors(structure, seed=0):
    """Factors that do not come from any model, of very different sizes."""
    rng = np.random.default_rng(seed)

    def draw(shapes):
        return tuple(
            jnp.asarray(rng.normal(size=(CHANNELS, *s)) * 10.0 ** rng.uniform(-3, 2) + 0.1, jnp.float32) for s in shapes
        )

    return Factors(draw(structure.activation_shapes), draw(structure.tangent_shapes))


def check_agrees(model, config, transcription, rtol, atol):
    """Check all features of a model against a transcription; return what it was done with."""
    structure = analyzed(model)
    module = config.module(structure, CHANNELS)
    weights, factors = lively_weights(module), random_factors(structure)
    outputs = jax.jit(module.apply)({"params": weights}, factors)
    reference = transcription(structure, weights, config)
    hs = reference.neurons(factors)
    for parameter, output in zip(structure.parameters, outputs, strict=True):
        expected = reference.parameter(parameter, hs)
        assert output.shape == (*parameter.shape, config.out_features)
        np.testing.assert_allclose(output, expected, rtol=rtol, atol=atol * np.abs(expected).max())
    return structure, weights, factors, hs


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_a_literal_transcription(name):
    structure, weights, factors, hs = check_agrees(MODELS[name], CONFIG, Reference, rtol=1e-4, atol=1e-5)

    invariant = InvariantGradMetaNet(structure, CONFIG, CHANNELS)
    invariant_weights = {**lively_weights(invariant), "trunk": weights["trunk"]}
    head = jax.tree.map(np.asarray, invariant_weights["head"])
    vector = jax.jit(invariant.apply)({"params": invariant_weights}, factors)
    expected = np.concatenate(hs).mean(0) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-5)


def test_weights_do_not_depend_on_the_model():
    shapes = [
        jax.tree.map(jnp.shape, init_gradmetanet(GradMetaNet(analyzed(model), CONFIG, CHANNELS), jax.random.key(0)))
        for model in (*MODELS.values(), mlp(2, 3), mlp(4, 5, 6, 7, 8, batch=3))
    ]
    assert all(s == shapes[0] for s in shapes)


def test_a_parameter_without_a_site_gets_no_features():
    structure = analyzed(
        (
            lambda p, x: (x @ p["w"]).sum() + p["loose"] ** 2,
            {"w": jnp.ones((3, 2)), "loose": jnp.ones(())},
            (jnp.ones((4, 3)),),
        )
    )
    module = GradMetaNet(structure, GradMetaNetConfig(), CHANNELS)
    weights = init_gradmetanet(module, jax.random.key(0))
    outputs = jax.jit(module.apply)({"params": weights}, random_factors(structure))
    assert [p.name for p, o in zip(structure.parameters, outputs) if o is None] == ["['loose']"]


def structure_of(spaces, sites):
    """A structure with nothing but sites, given as (spaces, activation, tangent)."""
    sites = tuple(
        Site(s, int(np.prod([spaces[i].size for i in s])), 4, (0,), activation, tangent)
        for s, activation, tangent in sites
    )
    return GradientStructure(tuple(spaces), sites, (), (), jax.tree.structure(()), (), ())


def test_encodings_tell_sites_and_fixed_neurons_apart_and_nothing_else():
    spaces = [Space(9, False), Space(3, True), Space(9, True), Space(2, False), Space(5, True)]
    both = (0, 0)
    sites = [((0,), 0, None), ((0,), 0, None), ((0,), *both), ((0,), None, 0)]
    sites += [
        ((2,), 0, None),
        ((2,), *both),
        ((2,), *both),
        ((2,), None, 0),
        ((1, 2), *both),
        ((3, 4), *both),
        ((4, 3), *both),
    ]
    encodings = encode_sites(structure_of(spaces, sites))
    seen = []
    for (site_spaces, *_), encoding in zip(sites, encodings, strict=True):
        assert encoding.shape[1] == ENCODING_FEATURES
        distinct = np.unique(encoding, axis=0)
        fixed = [spaces[i].size for i in site_spaces if not spaces[i].permutable]
        assert len(distinct) == np.prod(fixed, initial=1.0)
        seen.append(distinct)
    everything = np.concatenate(seen)
    distance = np.abs(everything[:, None] - everything[None]).max(-1) + np.eye(len(everything))
    assert distance.min() > 1e-2


def test_encodings_tell_many_sites_and_neurons_apart():
    deep = structure_of([Space(2, True)], [((0,), 0, 0)] * 200)
    wide = structure_of([Space(1_000, False)], [((0,), 0, 0)])
    for encodings in (np.stack([e[0] for e in encode_sites(deep)]), encode_sites(wide)[0]):
        distance = np.abs(encodings[:, None] - encodings[None]).max(-1) + np.eye(len(encodings))
        assert distance.min() > 1e-3


@pytest.mark.parametrize(
    ("config", "bad"),
    [
        *((GradMetaNetConfig, {name: value}) for name, value in (("width", True), ("product_width", 5000))),
        *((GradMetaNetConfig, {name: value}) for name, value in (("set_layers", 1.5), ("neuron_layers", -1))),
        (GradMetaNetPlusPlusConfig, {"blocks": 0}),
        *((config, bad) for config in (PointwiseMLP, UNF) for bad in ({"width": 0}, {"hidden_layers": 65})),
    ],
)
def test_impossible_architectures_are_refused(config, bad):
    # The run-time check of annotations, where it is on, comes first and raises a TypeError.
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        config(**bad)
