"""Convolutions: factors that give the gradient back, their matrices, and what optimizers make of them."""

import chex
import convolutional
import convolutions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import permute
import pytest
from optimizing import lively, play, relative_difference

import gmn_lopt
from gmn_lopt import (
    UNF,
    Denoised,
    GradMetaNetConfig,
    GradMetaNetPlusPlusConfig,
    LearnedOptimizer,
    Muon,
    PointwiseMLP,
    Residual,
    SetReader,
)
from gmn_lopt.factors import Conv
from gmn_lopt.factors.kinds.conv import MOST_PATCHES
from gmn_lopt.factors.matrices import as_stack, from_stack
from gmn_lopt.networks.encoding import encode_window
from gmn_lopt.optimizers.directions.denoised_layers import (
    LayerGroup,
    as_matrices,
    from_matrices,
    layer_groups,
)


@pytest.mark.parametrize("name", convolutions.CONVOLUTIONS)
def test_factors_give_the_gradient_back_and_so_do_patches(name):
    loss, params, args = convolutions.CONVOLUTIONS[name]()
    structure = gmn_lopt.analyze(loss, params, *args, strict=True)
    leaves = range(len(structure.parameters))
    (layer,) = (x for g in layer_groups(structure, leaves) for x in g.layers if isinstance(x.kind, Conv))
    group = LayerGroup((layer,), rows=layer.inputs)

    @jax.jit
    def compute(params, *args):
        value, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *args)
        patches = layer.kind.activation_rows(layer.parameter, factors.activations[layer.activation])
        if layer.bias is not None:
            patches = jnp.pad(patches, ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
        images = layer.kind.tangent.images(factors.tangents[layer.tangent])
        rows = layer.kind.tangent_rows(layer.parameter, images.reshape(-1, images.shape[-1]))
        matrices = as_matrices(group, structure.parameters, jax.tree.leaves(grads))
        again = from_matrices(group, structure.parameters, matrices)
        return (value, grads), structure.reconstruct(factors), patches.mT @ rows, matrices, again

    found, rebuilt, products, matrices, again = compute(params, *args)
    expected = jax.jit(jax.value_and_grad(loss))(params, *args)
    assert relative_difference(found, expected) < 1e-5
    assert relative_difference(rebuilt, expected[1]) < 1e-5
    assert relative_difference(products, matrices) < 1e-5
    for position, leaf in again.items():
        np.testing.assert_array_equal(leaf, jax.tree.leaves(found[1])[position])


@pytest.mark.parametrize("name", convolutions.CONVOLUTIONS)
def test_channels_are_neurons_and_positions_are_fixed(name):
    loss, params, args = convolutions.CONVOLUTIONS[name]()
    structure = gmn_lopt.analyze(loss, params, *args)
    (kernel,) = (p for p in structure.parameters if p.name == "['kernel']")
    at_sites = {d for ref in kernel.sites for d in ref.dims}
    assert at_sites.isdisjoint(kernel.positions)
    assert at_sites | {*kernel.positions} == set(range(len(kernel.cut_shape)))
    fixed = {*kernel.positions} | ({0} if name in ("scanned", "scanned, grouped", "ensemble") else set())
    for d, space in enumerate(kernel.spaces):
        assert structure.spaces[space].permutable == (d not in fixed)


NETWORKS = convolutional.NETWORKS | {
    name: convolutions.CONVOLUTIONS[name] for name in ("grouped", "depth multiplied", "3-D", "scanned, grouped")
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    loss, params, args = NETWORKS[request.param]()
    structure = gmn_lopt.analyze(loss, params, *args)
    compute = jax.jit(gmn_lopt.value_grad_and_factors(loss))
    return structure, loss, params, args, compute, compute(params, *args)


def test_every_kernel_of_a_network_is_factored_and_has_its_gradient_back(network):
    structure, loss, params, args, _, (value, _, factors) = network
    assert all(p.status == "factored" for p in structure.parameters if sum(size > 1 for size in p.shape) > 2)
    assert {layer.kernel for layer in structure.layers} >= {
        i for i, p in enumerate(structure.parameters) if p.positions
    }
    expected = jax.jit(jax.value_and_grad(loss))(params, *args)
    assert relative_difference(value, expected[0]) < 1e-6
    rebuilt = jax.tree.leaves(structure.reconstruct(factors, params, *args))
    pairs = zip(structure.parameters, rebuilt, jax.tree.leaves(expected[1]), strict=True)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected[1]))
    for parameter, found, wanted in pairs:
        # BatchNorm takes out what a bias before it does; what is left of its gradient is rounding.
        if parameter.status == "factored":
            assert np.abs(found - wanted).max() < 1e-5 * max(float(jnp.abs(wanted).max()), 0.1 * scale), parameter.name


def test_permuted_channels_permute_gradients_and_factors(network):
    structure, _, params, args, compute, (value, grads, factors) = network
    permutations = permute.draw(structure, 1)
    assert any(space.permutable for space in structure.spaces)
    permuted = compute(permute.parameters(structure, permutations, params), *args)
    assert relative_difference(permuted[0], value) < 1e-5
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    expected = permute.parameters(structure, permutations, grads), permute.factors(structure, permutations, factors)
    chex.assert_trees_all_close(permuted[1], expected[0], rtol=1e-3, atol=1e-5 * scale)
    chex.assert_trees_all_close(permuted[2], expected[1], rtol=1e-3, atol=1e-5)


SMALL = GradMetaNetConfig(width=8, set_layers=1, product_width=8)
ATTENTION = GradMetaNetPlusPlusConfig(width=8, product_width=8, blocks=1, heads=2)
OPTIMIZERS = {
    "denoised": {"direction": Denoised()},
    "muon": {"direction": Muon()},
    "ds+gmn": {"residual": Residual(network=PointwiseMLP(8, 2), gradmetanet=SetReader(SMALL, max_set_size=32))},
    "unf+gmn": {"residual": Residual(network=UNF(4, 2), gradmetanet=SetReader(SMALL, decays=()))},
    "ds+gmn++": {"residual": Residual(network=PointwiseMLP(8, 2), gradmetanet=SetReader(ATTENTION, 8, decays=()))},
}
CASES = [
    *(("denoised", name) for name in ("linen ResNet", "equinox ResNet", "MobileNet", "scanned, grouped")),
    ("muon", "grouped"),
    ("ds+gmn", "MobileNet"),
    ("unf+gmn", "haiku ResNet"),
    ("unf+gmn", "scanned, grouped"),
    ("ds+gmn++", "grouped"),
]


@pytest.mark.parametrize(("rule", "name"), CASES)
def test_permuted_channels_permute_the_update(rule, name):
    loss, params, args = NETWORKS[name]()
    structure = gmn_lopt.analyze(loss, params, *args)
    compute = jax.jit(gmn_lopt.value_grad_and_factors(loss))
    recorded = [(p, *compute(p, *args)[1:]) for p in (params, jax.tree.map(lambda x: 0.9 * x, params))]
    permutations = permute.draw(structure, 1)
    permuted = [
        (
            permute.parameters(structure, permutations, params),
            permute.parameters(structure, permutations, grads),
            permute.factors(structure, permutations, factors),
        )
        for params, grads, factors in recorded
    ]
    lopt = LearnedOptimizer(structure, **OPTIMIZERS[rule])
    phi = lively(lopt)
    for update, reference in zip(play(lopt, phi, permuted), play(lopt, phi, recorded)):
        difference = relative_difference(update, permute.parameters(structure, permutations, reference))
        assert difference < (5e-3 if "residual" not in OPTIMIZERS[rule] else 1e-4)


def test_positions_of_a_window_are_told_apart():
    loss, params, args = convolutions.CONVOLUTIONS["grouped"]()
    structure = gmn_lopt.analyze(loss, params, *args)
    (index,) = (i for i, p in enumerate(structure.parameters) if p.name == "['kernel']")
    encoding = encode_window(structure.parameters[index], 8)
    assert encoding.shape == (3, 3, 1, 1, 1, 8)
    assert len({tuple(x) for x in encoding.reshape(9, 8).round(4)}) == 9
    lopt = LearnedOptimizer(structure, **OPTIMIZERS["ds+gmn"])
    grads = jax.tree.map(jnp.ones_like, params)
    factors = gmn_lopt.Factors(
        *(tuple(map(jnp.ones, x)) for x in (structure.activation_shapes, structure.tangent_shapes))
    )
    update = play(lopt, lively(lopt), [(grads, grads, factors)])[0]["kernel"]
    assert len({*np.asarray(update[:, :, 0, 0]).ravel().round(6)}) == 9


def test_muon_takes_a_kernel_as_one_matrix():
    loss, params, args = convolutions.CONVOLUTIONS["odd layout"]()
    structure = gmn_lopt.analyze(loss, params, *args)
    (kernel,) = (p for p in structure.parameters if p.name == "['kernel']")
    stack = as_stack(kernel, params["kernel"])
    # It is stored as input channels, width, outputs, height.
    np.testing.assert_array_equal(stack, params["kernel"].transpose(1, 3, 0, 2).reshape(1, 2 * 3 * 4, 6))
    np.testing.assert_array_equal(from_stack(kernel, stack), params["kernel"])


def test_patches_are_of_a_bounded_number_of_examples_and_positions():
    loss, params, args = convolutions.convolution(convolutions.NHWC, (64, 7, 6, 4), (3, 3, 4, 6))
    structure = gmn_lopt.analyze(loss, params, *args)
    _, _, factors = gmn_lopt.value_grad_and_factors(loss)(params, *args)
    groups = layer_groups(structure, range(len(structure.parameters)))
    (layer, kind) = next((x, x.kind) for g in groups for x in g.layers if isinstance(x.kind, Conv))
    every = np.divmod(np.arange(64 * 42), 42)
    activation = factors.activations[layer.activation]
    patches = kind.activation_rows(layer.parameter, activation)
    all_patches = kind.patches(layer.parameter, activation, *every)
    assert patches.shape == (1, MOST_PATCHES, 36) and all_patches.shape == (1, 64 * 42, 36)
    rows, known = ({tuple(x) for x in np.asarray(a[0])} for a in (patches, all_patches))
    assert len(rows) == MOST_PATCHES and rows < known
    assert relative_difference(kind.second_moment(patches, 36), kind.second_moment(all_patches, 36)) < 0.1
    # Of a batch of another size, too: but not of images of another size.
    half = activation.reshape(64, 42, 4)[:32].reshape(-1, 4)
    assert kind.activation_rows(layer.parameter, half).shape == (1, MOST_PATCHES, 36)
    with pytest.raises(gmn_lopt.StructureError, match="analyse the loss with a batch of this size"):
        kind.activation_rows(layer.parameter, half[:-1])


@pytest.mark.parametrize("name", ["linen ResNet", "MobileNet"])
def test_the_denoised_step_lowers_the_loss_of_a_network(name):
    loss, params, args = NETWORKS[name]()
    structure = gmn_lopt.analyze(loss, params, *args)
    lopt = LearnedOptimizer(structure, Denoised())
    tx = lopt.optimizer(lopt.init(jax.random.key(0)), learning_rate=0.02)
    kernels = {i for i, p in enumerate(structure.parameters) if p.positions}
    assert kernels <= Denoised().rescaled(structure, range(len(structure.parameters)))

    @jax.jit
    def step(carry, _):
        params, state = carry
        value, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *args)
        updates, state = tx.update(grads, state, params, factors=factors)
        return (optax.apply_updates(params, updates), state), value

    _, values = jax.lax.scan(step, (params, tx.init(params)), None, 30)
    assert values[-1] < 0.5 * values[0]
