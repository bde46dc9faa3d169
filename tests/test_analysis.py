import jax
import jax.numpy as jnp
import numpy as np
import permute
import pytest
from models import BATCH, MODELS, cross_entropy, data, jnp_mlp, linen_mlp, sequence_model

import gmn_lopt
from gmn_lopt import StructureError, analyze, value_grad_and_factors


@pytest.mark.parametrize("name", MODELS)
def test_permuting_a_space_leaves_the_loss_alone(name):
    loss, params, args = MODELS[name]()
    structure = analyze(loss, params, *args)
    permutations = permute.draw(structure, 1)
    permuted = permute.parameters(structure, permutations, params)
    np.testing.assert_allclose(loss(permuted, *args), loss(params, *args), rtol=1e-5)
    _, _, factors = value_grad_and_factors(loss)(params, *args)
    _, _, moved = value_grad_and_factors(loss)(permuted, *args)
    expected = permute.factors(structure, permutations, factors)
    for got, want in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name, permutable",
    [
        ("jnp relu", [6, 8]),
        ("flax.linen", [6]),
        ("flax.nnx", [6]),
        ("equinox", [6, 6]),
        ("haiku", [6, 6]),
        ("vmap", [6, 8]),
        ("remat", [6, 8]),
        ("tied autoencoder", [6]),
        ("sequence", [2, 3, 3, 4]),
    ],
)
def test_every_symmetry_is_found(name, permutable):
    loss, params, args = MODELS[name]()
    structure = analyze(loss, params, *args)
    assert [space.size for space in structure.spaces if space.permutable] == permutable


@pytest.mark.parametrize(
    "use",
    [
        lambda h: jnp.cumsum(h, axis=1),
        lambda h: h * jnp.arange(h.shape[1]),
        lambda h: jnp.sort(h, axis=1),
        lambda h: h[:, ::-1],
        lambda h: h.at[:, 0].multiply(2.0),
        lambda h: h * (jnp.argmax(h, axis=1)[:, None] > 2),
        lambda h: jnp.concatenate([h[:, :3], 2 * h[:, 3:]], axis=1),
        lambda h: jnp.roll(h, 1, axis=1),
        lambda h: h + jnp.linspace(0.0, 1.0, h.shape[1]),
        lambda h: jnp.pad(h, ((0, 0), (1, 0)))[:, :-1],
        lambda h: h[:, jnp.array([1, 0, 2, 3, 4, 5])],
        lambda h: jax.lax.scan(lambda c, r: (c + r, c), jnp.zeros(h.shape[0]), h.T)[1].T,
        lambda h: jax.lax.dynamic_slice(h, (0, 1), (h.shape[0], 5)).sum(1, keepdims=True) + h,
        lambda h: jax.lax.conv_general_dilated(h[:, None], jnp.array([[[1.0, 2.0, 0.0]]]), (1,), "SAME")[:, 0],
        lambda h: (h.reshape(-1, 2, 3) * jnp.arange(2)[:, None] * jnp.arange(3)).reshape(-1, 6),
    ],
)
def test_neurons_used_by_position_are_fixed(use):
    def loss(params, x):
        h = use(jnp.tanh(x @ params["a"]))
        return jnp.mean((h @ params["b"]) ** 3)

    params = {
        "a": jax.random.normal(jax.random.key(0), (7, 6)),
        "b": jax.random.normal(jax.random.key(1), (6, 3)),
    }
    structure = analyze(loss, params, data()[0])
    hidden = structure.parameters[0].spaces[1:]
    assert not any(structure.spaces[i].permutable for i in hidden)


def test_half_used_by_position_keeps_the_other_factor():
    def loss(params, x):
        h = jnp.tanh(x @ params["a"]).reshape(-1, 2, 3) * jnp.arange(1.0, 3.0)[:, None]
        return jnp.mean((h.reshape(-1, 6) @ params["b"]) ** 3)

    structure = analyze(loss, {"a": jnp.ones((7, 6)), "b": jnp.ones((6, 3))}, data()[0])
    a = structure.parameters[0]
    assert a.cut_shape == (7, 2, 3)
    assert [structure.spaces[i].permutable for i in a.spaces] == [False, False, True]


def test_dropout_keeps_the_symmetry():
    def loss(params, x, key):
        h = jnp.tanh(x @ params["a"])
        h = jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h / 0.5, 0.0)
        return jnp.mean((h @ params["b"]) ** 2)

    params = {"a": jnp.ones((7, 6)), "b": jnp.ones((6, 3))}
    structure = analyze(loss, params, data()[0], jax.random.key(0))
    assert structure.spaces[1].permutable and structure.spaces[1].size == 6


def test_mlp_has_the_papers_sites():
    loss, params, args = jnp_mlp()
    structure = analyze(loss, params, *args)
    assert [(site.kind, site.size, site.set_size) for site in structure.sites] == [
        ("input", 7, BATCH),
        ("inner", 6, BATCH),
        ("inner", 8, BATCH),
        ("output", 5, BATCH),
    ]
    kernel, bias = structure.parameters[1], structure.parameters[0]
    assert [ref.site for ref in kernel.sites] == [0, 1] and [ref.site for ref in bias.sites] == [1]
    assert [(s.size, s.permutable) for s in structure.spaces] == [(7, False), (6, True), (8, True), (5, False)]


def test_residual_copies_are_separate_sites_of_one_space():
    loss, params, args = linen_mlp()
    structure = analyze(loss, params, *args)
    stream = [site for site in structure.sites if site.kind == "inner"]
    assert len(stream) == 2 and stream[0].spaces == stream[1].spaces
    by_name = {p.name: p for p in structure.parameters}
    scale = by_name["['params']['LayerNorm_0']['scale']"]
    reader = by_name["['params']['Dense_2']['kernel']"]
    assert scale.status == "unfactored" and scale.sites[0].site == reader.sites[0].site
    # Two kernels whose outputs are only added to one another share their tangent.
    both = [layer for layer in structure.layers if "Dense_0" in structure.parameters[layer.kernel].name]
    both += [layer for layer in structure.layers if "Dense_1" in structure.parameters[layer.kernel].name]
    assert both[0].tangent == both[1].tangent


def test_pairs_follow_dependence_in_parallel_blocks():
    def loss(params, x):
        a, b = jnp.tanh(x @ params["a"]), jnp.sin(x @ params["b"])
        u = jnp.tanh(b @ params["c"])  # reads the second write first
        return jnp.mean((a + u) ** 2 + (a @ params["d"]) ** 2 + b)

    square = jnp.ones((6, 6))
    params = {"a": jnp.ones((7, 6)), "b": jnp.ones((7, 6)), "c": square, "d": square}
    structure = analyze(loss, params, data()[0])
    sites = {p.name: [ref.site for ref in p.sites] for p in structure.parameters}
    assert sites["['c']"][0] == sites["['b']"][1]
    assert sites["['d']"][0] == sites["['a']"][1]


def test_sets_differ_before_and_after_pooling():
    loss, params, args = sequence_model()
    structure = analyze(loss, params, *args)
    before = [site for site in structure.sites if site.set_size == 3 * BATCH]
    after = [site for site in structure.sites if site.set_size == BATCH]
    assert len({site.set_axes for site in before}) == 1 and len(before) == 4
    assert [site.kind for site in after] == ["input", "output"]
    head = {p.name: p for p in structure.parameters}["['head']"]
    assert [ref.dims for ref in head.sites] == [(0, 1), (0, 2)]


def test_status_of_parameters():
    def loss(params, x):
        h = x @ (params["a"] @ params["b"])
        h = jnp.tanh(h @ params["penalised"]) * params["scale"]
        return jnp.mean((h @ params["plain"]) ** 2) + jnp.sum(params["penalised"] ** 2)

    params = {
        "a": jnp.ones((7, 2)),
        "b": jnp.ones((2, 6)),
        "penalised": jnp.ones((6, 6)),
        "plain": jnp.ones((6, 3)),
        "scale": jnp.ones(6),
        "unused": jnp.ones(4),
    }
    structure = analyze(loss, params, data()[0])
    assert {p.name: p.status for p in structure.parameters} == {
        "['a']": "factored",
        "['b']": "factored",
        "['penalised']": "partial",
        "['plain']": "factored",
        "['scale']": "unfactored",
        "['unused']": "unused",
    }
    text = str(structure)
    assert "['unused'] is unused: the loss does not depend on it" in text
    assert "['penalised'] is partial: also in a term of the loss that depends on parameters only" in text
    assert "['scale'] is unfactored: a scale: multiplied with activations" in text
    # A penalty is no reason to complain.
    with pytest.raises(StructureError, match=r"2 parameters have no complete factors: \['scale'\].*\['unused'\]"):
        analyze(loss, params, data()[0], strict=True)


def test_positional_table_is_no_bias():
    def loss(params, x):
        h = x @ params["w"] + params["table"]
        return jnp.mean(jnp.tanh(h) @ params["v"])

    params = {"w": jnp.ones((7, 6)), "table": jnp.ones((3, 6)), "v": jnp.ones((6, 2))}
    structure = analyze(loss, params, jnp.ones((BATCH, 3, 7)))
    table = {p.name: p for p in structure.parameters}["['table']"]
    assert table.status == "unfactored" and [structure.spaces[i].permutable for i in table.spaces] == [False, True]
    assert structure.sites[table.sites[0].site].kind == "inner" and table.sites[0].dims == (1,)


def test_structure_is_static_and_depends_on_shapes_alone():
    loss, params, args = jnp_mlp()
    structure = analyze(loss, params, *args)
    abstract = jax.eval_shape(lambda: (params, args))
    assert structure == analyze(loss, abstract[0], *abstract[1])
    assert len({structure, analyze(loss, params, *args)}) == 1
    assert jax.jit(lambda s, x: x * len(s.layers), static_argnums=0)(structure, 2.0) == 6.0
    assert structure != analyze(loss, params, *(arg[:5] for arg in args))


def test_labels_are_by_position_for_every_form_of_cross_entropy():
    def one_hot(params, x, labels):
        return -jnp.mean(jnp.sum(jax.nn.one_hot(labels, 5) * jax.nn.log_softmax(x @ params), axis=1))

    def indexed(params, x, labels):
        return -jnp.mean(jax.nn.log_softmax(x @ params)[jnp.arange(len(labels)), labels])

    x, labels, _ = data()
    for loss in (one_hot, indexed, lambda p, x, y: cross_entropy(x @ p, y)):
        assert not any(space.permutable for space in analyze(loss, jnp.ones((7, 5)), x, labels).spaces)


def test_repeated_layers_are_collapsed_and_optimizers_explain_themselves():
    def loss(params, x):
        h = x
        for block in params["blocks"]:
            h = h + jnp.tanh(h * block["scale"] @ block["w"]) @ block["v"]
        return jnp.mean(jnp.tanh(h @ params["out"] @ params["out"].T) ** 2)

    block = {"scale": jnp.ones(6), "w": jnp.ones((6, 8)), "v": jnp.ones((8, 6))}
    params = {"blocks": [block] * 9, "out": jnp.ones((6, 6))}
    structure = analyze(loss, params, jnp.ones((5, 6)))
    lines = str(structure).splitlines()
    assert lines[0] == "19 of 28 parameters factored, 900 of 954 entries" and len(lines) < 25
    assert "['blocks'][0]['scale'] and 8 like it are unfactored: a scale: multiplied with activations" in lines[1]
    assert "['blocks'][0]['v'] [8x6]: site 1 -> site 2; and 8 like it" in str(structure).replace("site 3", "site 2")
    text = gmn_lopt.explain(structure, "default+gmn")
    assert "468 of 954 entries: the denoised step, by their factors\n" in text
    assert "432 of 954 entries: the denoised step, by their factors, orthogonal" in text
    assert "54 of 954 entries: Adam's direction: a scale: multiplied with activations" in text
    assert "a network adds its part, which reads factors and gradients" in text and "times the parameters" in text
