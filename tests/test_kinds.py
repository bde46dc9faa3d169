"""Kinds of layers: a new one is a class and an entry in the list of kinds, and nothing else has to know of it."""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmn_lopt import StructureError, analyze, value_grad_and_factors
from gmn_lopt.factors import Dense, Embedding, LayerKind
from gmn_lopt.factors.jaxpr import layers
from gmn_lopt.factors.kinds import KernelDims
from gmn_lopt.optimizers.directions.denoised_layers import layer_groups


@dataclass(frozen=True)
class Convolution(LayerKind):
    """The least that a kind has to say: factors are images, and the kernel is no matrix."""

    @classmethod
    def match(cls, equation, kernels):
        return (cls(), 1) if equation.name == "conv_general_dilated" and 1 in kernels else None

    def kernel_dims(self, equation, operand):
        outputs, inputs, *_ = equation.params["dimension_numbers"].rhs_spec
        return KernelDims((inputs,), (outputs,))

    def neuron_dims(self, equation, operand, shared):
        numbers = equation.params["dimension_numbers"]
        return {numbers.lhs_spec[1]}, {numbers.out_spec[1]}

    def matrices(self, kernel):
        return None


def draw(**shapes):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


PARAMS = draw(kernel=(3, 3, 2, 4), bias=(4,), out=(4, 5))
IMAGES = draw(x=(6, 8, 8, 2))["x"]


def loss(params, x):
    x = jax.lax.conv_general_dilated(x, params["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.mean(jnp.tanh(x + params["bias"]).mean((1, 2)) @ params["out"])


def test_a_new_kind_is_a_class_and_an_entry(monkeypatch):
    monkeypatch.setattr(layers, "KINDS", (Embedding, Dense))
    with pytest.raises(StructureError, match=r"\['kernel'\] is unfactored: used by conv_general_dilated"):
        analyze(loss, PARAMS, IMAGES, strict=True)
    monkeypatch.setattr(layers, "KINDS", (*layers.KINDS, Convolution))
    structure = analyze(loss, PARAMS, IMAGES, strict=True)
    assert [layer.kind for layer in structure.layers] == [Convolution(), Dense()]
    assert "['kernel'] [3x3x2x4] + ['bias']: site 0 -> site 1" in str(structure)
    kernel = next(p for p in structure.parameters if p.name == "['kernel']")
    assert [ref.dims for ref in kernel.sites] == [(2,), (3,)]
    _, grads, factors = jax.jit(value_grad_and_factors(loss))(PARAMS, IMAGES)
    chex.assert_shape([factors.activations[0], factors.tangents[0]], [(6 * 8 * 8, 2), (6 * 4 * 4, 4)])
    chex.assert_trees_all_close(structure.reconstruct(factors), grads, rtol=1e-4, atol=1e-6)
    (group,) = layer_groups(structure, range(len(structure.parameters)))
    assert group.layers[0].kind == Dense()


def test_kinds_are_part_of_what_makes_structures_equal():
    table, ids, one_hot = draw(t=(5, 3))["t"], jnp.array([0, 3, 3]), jnp.eye(5)[jnp.array([0, 3, 3])]
    lookup = analyze(lambda p, x: jnp.sum(jnp.tanh(p[x])), table, ids)
    product = analyze(lambda p, x: jnp.sum(jnp.tanh(x @ p)), table, one_hot)
    assert lookup.layers[0].kind == Embedding() != product.layers[0].kind
    assert lookup.token_ids == {0} and not product.token_ids
    assert len({lookup, analyze(lambda p, x: jnp.sum(jnp.tanh(p[x])), table, ids), product}) == 2
