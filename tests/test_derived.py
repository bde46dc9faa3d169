"""Kernels computed from parameters: what the factors give of the gradient, and which parameter is the kernel."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmn_lopt import StructureError, analyze, value_grad_and_factors


def draw(**shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {name: jax.random.normal(key, shape) / 2 for key, (name, shape) in zip(keys, shapes.items())}


X = jax.random.normal(jax.random.key(9), (10, 6))
MASK = jnp.arange(24).reshape(6, 4) % 3 > 0


def after(kernel):
    """The loss of a network whose first kernel is computed from parameters."""
    return lambda p, x: jnp.mean(jnp.sin(jnp.tanh(x @ kernel(p)) @ p["out"]) ** 2)


def standardized(w):
    return (w - w.mean(0)) / (w.std(0) + 1e-3)


KERNELS = {
    # name: kernel of p, shapes of its parameters, whether each of them is a kernel to an optimizer, arguments needed
    "times a constant": (lambda p: 3.0 * p["w"], {"w": (6, 4)}, {"w"}, False),
    "over a constant": (lambda p: p["w"] / jnp.sqrt(6.0), {"w": (6, 4)}, {"w"}, False),
    "masked": (lambda p: p["w"] * MASK, {"w": (6, 4)}, {"w"}, False),
    "selected": (lambda p: jnp.where(MASK, p["w"], 0.0), {"w": (6, 4)}, {"w"}, False),
    "learned scalar": (lambda p: p["s"] * p["w"], {"w": (6, 4), "s": ()}, {"w"}, True),
    "concatenated outputs": (lambda p: jnp.hstack([p["a"], p["b"]]), {"a": (6, 1), "b": (6, 3)}, {"a", "b"}, False),
    "concatenated inputs": (lambda p: jnp.concatenate([p["a"], p["b"]]), {"a": (2, 4), "b": (4, 4)}, {"a", "b"}, False),
    "padded": (lambda p: jnp.pad(p["w"], ((1, 2), (0, 1))), {"w": (3, 3)}, {"w"}, False),
    "rolled": (lambda p: jnp.roll(p["w"], 1, 0), {"w": (6, 4)}, set(), False),
    "sliced": (lambda p: p["w"][1:7, 2:6], {"w": (9, 7)}, set(), False),
    "standardised": (lambda p: standardized(p["w"]), {"w": (6, 4)}, {"w"}, True),
    "weight norm": (
        lambda p: p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0),
        {"w": (6, 4), "g": (4,)},
        {"w"},
        True,
    ),
    "low rank": (lambda p: p["a"] @ p["b"], {"a": (6, 2), "b": (2, 4)}, set(), True),
    "merged LoRA": (lambda p: p["w"] + 0.5 * p["a"] @ p["b"], {"w": (6, 4), "a": (6, 2), "b": (2, 4)}, {"w"}, True),
    "two summands": (lambda p: p["a"] + p["b"], {"a": (6, 4), "b": (6, 4)}, {"a", "b"}, False),
    "positive": (lambda p: jax.nn.softplus(p["w"]), {"w": (6, 4)}, set(), True),
    "symmetric": (lambda p: (p["w"] + p["w"].T)[:, :4], {"w": (6, 6)}, set(), False),
    "transposed and scaled": (lambda p: (2 * p["w"]).T, {"w": (4, 6)}, {"w"}, False),
    "frozen and tuned": (lambda p: MASK + p["w"], {"w": (6, 4)}, {"w"}, False),
}


def check(loss, params, *args):
    """Value and gradient are JAX's, bit for bit; factors rebuild the gradients of all that is said to be factored."""
    structure = analyze(loss, params, *args)
    value, grads, factors = jax.jit(value_grad_and_factors(loss))(params, *args)
    expected = jax.jit(jax.value_and_grad(loss))(params, *args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), (value, grads), expected)
    rebuilt = jax.tree.leaves(structure.reconstruct(factors, params, *args))
    for parameter, got, want in zip(structure.parameters, rebuilt, jax.tree.leaves(grads), strict=True):
        if parameter.status == "factored":
            np.testing.assert_allclose(
                got, want, rtol=1e-5, atol=1e-6 + 1e-5 * np.abs(want).max(), err_msg=parameter.name
            )
    return structure, factors


@pytest.mark.parametrize("name", KERNELS)
def test_the_gradient_of_each_parameter_follows_from_the_factors_of_the_kernel(name):
    kernel, shapes, kernels, needs_arguments = KERNELS[name]
    params = draw(out=(4, 3), **shapes)
    structure, factors = check(after(kernel), params, X)
    assert [p.status for p in structure.parameters] == ["factored"] * len(params), str(structure)
    by_name = {p.name[2:-2]: p for p in structure.parameters}
    covers = lambda p: {d for ref in p.sites for d in ref.dims} == set(range(len(p.cut_shape)))  # noqa: E731
    assert {name for name in shapes if len(by_name[name].sites) == 2 and covers(by_name[name])} == kernels
    if needs_arguments:
        with pytest.raises(StructureError, match=r"reconstruct\(factors, params, \*args\)"):
            structure.reconstruct(factors)
    else:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            structure.reconstruct(factors),
            structure.reconstruct(factors, params, X),
        )


def test_masks_that_are_arguments():
    def loss(params, mask, x):
        return jnp.mean(jnp.tanh(x @ (params["w"] * mask)) @ params["out"])

    structure, _ = check(loss, draw(w=(6, 4), out=(4, 3)), MASK, X)
    assert [p.status for p in structure.parameters] == ["factored"] * 2


def test_a_scale_of_activations_is_no_kernel():
    def loss(params, x):
        return jnp.mean((x * params["scale"]) @ params["w"])

    structure, _ = check(loss, draw(w=(6, 4), scale=(6,)), X)
    assert {p.name: p.status for p in structure.parameters} == {"['scale']": "unfactored", "['w']": "factored"}


@pytest.mark.parametrize(
    "cell", [nn.OptimizedLSTMCell(5), nn.LSTMCell(5), nn.GRUCell(5)], ids=lambda c: type(c).__name__
)
def test_recurrent_cells(cell):
    model = nn.RNN(cell)
    x = jax.random.normal(jax.random.key(3), (4, 7, 6))
    params = model.init(jax.random.key(0), x)
    structure, _ = check(lambda p, x: jnp.mean(model.apply(p, x) ** 2), params, x)
    assert {p.status for p in structure.parameters} == {"factored"}, str(structure)
    assert all(len(p.sites) == 2 for p in structure.parameters if len(p.shape) == 2)
    # Neurons of all gates are the same ones.
    assert {space.size for space in structure.spaces if space.permutable} == {5}


def test_flax_weight_norm():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(3))(jnp.tanh(nn.WeightNorm(nn.Dense(4))(x)))

    params = Model().init(jax.random.key(0), X)
    structure, _ = check(lambda p, x: jnp.mean(Model().apply(p, x) ** 2), params, X)
    assert {p.status for p in structure.parameters} == {"factored"}, str(structure)


def test_spectral_norm_reads_the_layer_and_not_the_power_iteration():
    model, state = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(
        eqx.nn.Linear(6, 4, key=jax.random.key(0)), "weight", key=jax.random.key(1)
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x):
        model = eqx.combine(params, static)
        clone = jax.tree.map(lambda leaf: leaf, state)
        return jnp.mean(jax.vmap(lambda x: model(x, clone)[0])(x) ** 2)

    structure, _ = check(loss, params, X)
    assert [p.status for p in structure.parameters] == ["factored"] * 2, str(structure)
    assert structure.activation_shapes == ((10, 6),) and structure.tangent_shapes == ((10, 4),)


def test_stacked_layers_with_weight_norm():
    def loss(params, x):
        def block(h, layer):
            w = layer["v"] * layer["g"] / jnp.linalg.norm(layer["v"], axis=0)
            return h + jnp.tanh(h @ w), None

        return jnp.mean(jax.lax.scan(block, x, params)[0] ** 2)

    structure, _ = check(loss, draw(v=(3, 6, 6), g=(3, 6)), X)
    assert [p.status for p in structure.parameters] == ["factored"] * 2, str(structure)


def test_what_leaves_every_entry_in_place_is_seen_through():
    from jax.ad_checkpoint import checkpoint_name
    from jax.sharding import NamedSharding, PartitionSpec

    place = NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec())
    same = [
        lambda x: checkpoint_name(x, "kept"),
        lambda x: jax.lax.optimization_barrier((x, 2 * x))[0],
        lambda x: jax.lax.with_sharding_constraint(x, place),
    ]
    plain = lambda p, x: jnp.mean(jnp.tanh(x @ p["w"] + p["b"]) @ p["out"])  # noqa: E731
    params = draw(w=(6, 4), b=(4,), out=(4, 3))
    expected = str(analyze(plain, params, X))
    for f in same:
        loss = lambda p, x, f=f: jnp.mean(f(jnp.tanh(f(f(f(x) @ f(p["w"])) + f(p["b"])))) @ p["out"])  # noqa: E731
        structure, _ = check(loss, params, X)
        assert str(structure) == expected
