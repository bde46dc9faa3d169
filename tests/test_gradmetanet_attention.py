"""GradMetaNet++ against a literal transcription of its definition, and what memory its attention takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizing import analyzed, mlp, residual
from test_gradmetanet import CHANNELS, Reference, check_agrees, lively_weights, random_factors, relu

from gmn_lopt import Factors
from gmn_lopt.networks import GradMetaNetPlusPlus, GradMetaNetPlusPlusConfig, InvariantGradMetaNet, init_gradmetanet
from gmn_lopt.networks.attention import attention
from gmn_lopt.networks.encoding import encode_sites

CONFIG = GradMetaNetPlusPlusConfig(width=6, blocks=2, heads=2, product_width=5, out_features=4)
MODELS = {"mlp": mlp(5, 7, 6, 4), "residual": residual()}


def softmax_attention(q, k, v):
    """One head, one entry of the batch."""
    scores = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
    return scores / scores.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("rows", [1000, 20, 7, 3])
def test_attention_in_pieces_is_attention(rows):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 5, 10, 2, 4))
    result = jax.jit(lambda *x: attention(*x, rows=rows))(q, k, v)
    for b in range(5):
        for h in range(2):
            expected = softmax_attention(*(np.asarray(x[b, :, h], np.float64) for x in (q, k, v)))
            np.testing.assert_allclose(result[b, :, h], expected, rtol=1e-4, atol=1e-5)


def slices(values, elements):
    """The features of all neurons at each element of a set; sites with smaller sets are not read, they wrap around."""
    return [[x[s % len(x)] for x in values] for s in range(elements)]


class AttentionReference(Reference):
    """One neuron and one set element at a time, in numpy and float64."""

    def self_attention(self, x, w):
        normal = self.normal(x)
        width = x.shape[-1] // self.config.heads
        q, k, v = (normal @ w[f"{name}"] + w[f"{name}_bias"] for name in ("query", "key", "value"))
        heads = [slice(h * width, (h + 1) * width) for h in range(self.config.heads)]
        mixed = np.concatenate([softmax_attention(q[:, h], k[:, h], v[:, h]) for h in heads], axis=-1)
        return x + mixed @ w["out"] + w["out_bias"]

    @staticmethod
    def normal(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def block(self, xs, w):
        sites = self.structure.sites
        xs = [np.stack([self.self_attention(x[:, i], w["over_set"]) for i in range(x.shape[1])], 1) for x in xs]
        mixed = []
        for a in sites:
            companions = [x for b, x in zip(sites, xs) if b.set_axes == a.set_axes]
            begin = sum(b.size for b in sites[: len(mixed)] if b.set_axes == a.set_axes)
            everything = np.concatenate(companions, axis=1)
            rows = [self.self_attention(row, w["over_neurons"])[begin : begin + a.size] for row in everything]
            mixed.append(np.stack(rows))
        normal = [self.normal(x) for x in mixed]
        copies = self.copies(normal, with_sets=True)
        return [
            x + relu(n @ w["own"] + c @ w["copies_mean"] + w["bias"]) @ w["out"] + w["out_bias"]
            for x, n, c in zip(mixed, normal, copies)
        ]

    def neurons(self, factors):
        w, xs = self.w["trunk"], []
        for site, encoding in zip(self.structure.sites, encode_sites(self.structure)):
            a = None if site.activation is None else factors.activations[site.activation]
            g = None if site.tangent is None else factors.tangents[site.tangent]
            slots = [g if a is None else a, a if g is None else g]
            x = np.concatenate([np.moveaxis(np.asarray(slot, np.float64), 0, -1) for slot in slots], axis=-1)
            x = x / np.sqrt((x**2).mean((0, 1)) + 1e-5)
            xs.append(x @ w["own"] + encoding @ w["encoding"] + w["bias"])
        for i in range(self.config.blocks):
            xs = self.block(xs, w[f"blocks_{i}"])
        return [self.normal(x) for x in xs]

    def parameter(self, parameter, hs):
        """The mean over the set, or of the means where the two sites have different sets."""
        sets = {self.structure.sites[ref.site].set_axes for ref in parameter.sites}
        if len(sets) != 1:
            return super().parameter(parameter, [h.mean(0) for h in hs])
        elements = len(hs[parameter.sites[0].site])
        of_element = [super(AttentionReference, self).parameter(parameter, hs) for hs in slices(hs, elements)]
        return np.mean(of_element, axis=0)


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_a_literal_transcription(name):
    check_agrees(MODELS[name], CONFIG, AttentionReference, rtol=1e-3, atol=1e-4)


def test_it_reads_as_many_set_elements_as_it_is_given():
    """A set in which everything occurs twice is the same to it: attention and means do not count."""
    structure = analyzed(MODELS["mlp"])
    module = GradMetaNetPlusPlus(structure, CONFIG, CHANNELS)
    weights, factors = lively_weights(module), random_factors(structure)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), factors)
    once, both = (jax.jit(module.apply)({"params": weights}, f) for f in (factors, twice))
    for a, b in zip(once, both, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_the_invariant_head_reads_the_mean_over_neurons_and_set():
    structure = analyzed(MODELS["mlp"])
    module = InvariantGradMetaNet(structure, CONFIG, CHANNELS)
    weights, factors = lively_weights(module), random_factors(structure)
    hs = AttentionReference(structure, weights, CONFIG).neurons(factors)
    head = jax.tree.map(np.asarray, weights["head"])
    expected = np.concatenate([h.mean(0) for h in hs]).mean(0) @ head["kernel"] + head["bias"]
    result = jax.jit(module.apply)({"params": weights}, factors)
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-5)


def test_weights_do_not_depend_on_the_model():
    one, other = (
        jax.tree.map(jnp.shape, init_gradmetanet(CONFIG.module(analyzed(model), CHANNELS), jax.random.key(0)))
        for model in (MODELS["residual"], mlp(2, 3, batch=3))
    )
    assert one == other


def peak(hidden, batch):
    """Bytes of temporary memory of one application, of its gradient as well, to a wide MLP."""
    structure = analyzed(mlp(3, hidden, 2, batch=batch))
    module = GradMetaNetPlusPlusConfig(8, blocks=1, heads=2, product_width=4, out_features=2).module(structure, 1)
    weights = jax.eval_shape(lambda: init_gradmetanet(module, jax.random.key(0)))
    factors = jax.tree.map(lambda x: x[:1], random_factors(structure))

    def total(weights, *factors):
        return sum(jnp.sum(x**2) for x in module.apply({"params": weights}, Factors(*factors)))

    compiled = jax.jit(jax.grad(total)).lower(weights, factors.activations, factors.tangents).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("which", ["neurons", "set"])
def test_memory_grows_linearly(which):
    sizes = (1024, 4096)
    # With the 5 inputs and outputs the neurons are a multiple of the queries handled at a time, so pieces are equal.
    small, large = (peak(n - 5, 4) if which == "neurons" else peak(4, n) for n in sizes)
    assert large < 1.2 * sizes[1] / sizes[0] * small
    scores = 4 * 2 * 4 * sizes[1] ** 2  # bytes of all scores of four entries and two heads
    assert large < scores


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads is 5; it must divide the width, 32"):
        GradMetaNetPlusPlusConfig(heads=5)
