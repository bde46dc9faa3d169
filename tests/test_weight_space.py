"""Weight-space networks and editors: equivariant, the same for every loss of one architecture, and saved."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gmn_lopt
from gmn_lopt.networks.deep_weight_space import DeepWeightSpace
from gmn_lopt.networks.editor import Editor, editing_loss, shown
from gmn_lopt.networks.graph import GraphNetwork
from gmn_lopt.networks.saved_editor import EditorError, load_editor, save_editor

POINTS = ((-0.5, 0.25), (0.5, 0.75), (0.0, -1.0))
READERS = {
    "gradmetanet": gmn_lopt.GradMetaNetConfig(width=4, set_layers=1, product_width=4, out_features=3),
    "gradmetanet++": gmn_lopt.GradMetaNetPlusPlusConfig(width=4, blocks=1, heads=2, product_width=4, out_features=3),
}
NETWORKS = {"dws": DeepWeightSpace(6, 1), "gmn": GraphNetwork(6, 2)}


def forward(params, points):
    """A network with sines and layers of different widths."""
    values = [points]
    for i in range(len(params) // 2):
        u = values[-1] @ params[f"w{i}"] + params[f"b{i}"]
        values.append(jnp.sin(3.0 * u) if i + 1 < len(params) // 2 else u)
    return tuple(values[1:])


def draw(sizes=(2, 5, 4, 3), seed=0):
    rng = np.random.default_rng(seed)
    params = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        params[f"w{i}"] = jnp.asarray(rng.normal(size=(rows, columns)), jnp.float32)
        params[f"b{i}"] = jnp.asarray(rng.normal(size=columns), jnp.float32)
    return params


def permuted(params, orders):
    """The same function with the neurons of hidden layers in another order."""
    found = dict(params)
    for i, order in enumerate(orders):
        found[f"w{i}"], found[f"b{i}"] = found[f"w{i}"][..., order], found[f"b{i}"][..., order]
        found[f"w{i + 1}"] = found[f"w{i + 1}"][..., order, :]
    return found


def random_weights(module, *arguments):
    """Weights that are all different, none of them zero."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, jnp.float32), shapes)


def values_of(channels):
    return jnp.asarray(np.random.default_rng(2).normal(size=(len(POINTS), channels)), jnp.float32)


def allclose(found, expected, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), found, expected)


@pytest.mark.parametrize(
    ("network", "channels", "reads"),  # with one channel, the last kernel is over one space, and its bias over none
    [
        ("dws", 1, "gradmetanet++"),
        ("dws", 3, "probing"),
        ("gmn", 1, "gradmetanet"),
        ("gmn", 3, "told"),
    ],
)
def test_editors_are_equivariant(network, channels, reads):
    more = {"probing": {"probes": 4}, "told": {"told": True}}.get(reads, {"reader": READERS.get(reads)})
    editor = Editor(NETWORKS[network], POINTS, heads=2, **more)
    params, values = draw((2, 5, 4, channels)), values_of(channels)
    module = editor.module(forward, params)
    weights = random_weights(module, params, values)
    apply = jax.jit(lambda params: module.apply({"params": weights}, params, values))
    orders = [np.random.default_rng(3).permutation(n) for n in (5, 4)]
    edited = apply(params)
    again = apply(permuted(params, orders))
    allclose(again, permuted(edited, orders))
    # The edit shows in what networks show, not only in their weights; the test would pass for one that does nothing.
    at = jnp.asarray(POINTS)
    assert jnp.abs(shown(forward, edited, at) - forward(params, at)[-1]).max() > 1e-3
    allclose(shown(forward, again, at), shown(forward, edited, at), atol=1e-3)


@pytest.mark.parametrize("network", NETWORKS)
def test_inputs_and_outputs_are_told_apart(network):
    params = draw()
    editor = Editor(NETWORKS[network], POINTS)
    module = editor.module(forward, params)
    weights = random_weights(module, params, values_of(3))
    edit = lambda params: module.apply({"params": weights}, params, values_of(3))  # noqa: E731
    swapped = {**params, "w0": params["w0"][::-1]}
    difference = jnp.abs(edit(swapped)["w0"][:, ::-1] - edit(params)["w0"]).max()
    assert difference > 1e-3, "the two inputs are handled alike"


@pytest.mark.parametrize(("reads", "used"), [("weights", False), ("gradmetanet", True)])
def test_known_values_reach_only_methods_that_read_them(reads, used):
    editor = Editor(NETWORKS["gmn"], POINTS, reader=READERS.get(reads))
    params, values = draw(), values_of(3)
    module = editor.module(forward, params)
    weights = random_weights(module, params, values)
    one, other = (module.apply({"params": weights}, params, v) for v in (values, values * jnp.arange(1.0, 4.0)))
    assert bool(jnp.abs(one["w1"] - other["w1"]).max() > 1e-5) == used


def test_factors_of_the_editing_loss_are_the_gradients_of_single_points():
    params, points, values = draw(), jnp.asarray(POINTS), values_of(3)
    loss = editing_loss(forward)
    _, _, factors = gmn_lopt.value_grad_and_factors(loss)(params, points, values)
    structure = gmn_lopt.analyze(loss, params, points, values)
    dense = jax.vmap(lambda x, y: jax.grad(loss)(params, x[None], y[None]))(points, values)
    for layer in structure.layers:
        names = [structure.parameters[i].name[2:-2] for i in (layer.kernel, layer.bias)]
        a, g = factors.activations[layer.activation], len(points) * factors.tangents[layer.tangent]
        allclose(jnp.einsum("si,sj->sij", a, g), dense[names[0]])
        allclose(g, dense[names[1]])


def test_the_change_is_scaled_and_starts_small():
    params, values = draw(), values_of(3)
    module = Editor(NETWORKS["gmn"], POINTS, heads=3).module(forward, params)
    weights = module.init(jax.random.key(0), params, values)["params"]
    assert jnp.exp(weights["log_scale"]) == pytest.approx(0.01)
    edited = module.apply({"params": weights}, params, values)
    doubled = module.apply({"params": {**weights, "log_scale": jnp.log(0.02)}}, params, values)
    change, twice = (jax.tree.map(lambda x, y: x - y, e, params) for e in (edited, doubled))
    allclose(jax.tree.map(lambda x: 2 * x, change), twice, atol=1e-6)
    heads = change["w1"]
    assert heads.shape == (3, 5, 4) and jnp.abs(heads[0] - heads[1]).max() > 1e-6, "heads that start alike stay alike"


def test_what_heads_show_is_the_mean_of_their_values():
    several = jax.tree.map(lambda *x: jnp.stack(x), draw(seed=0), draw(seed=1))
    points = jnp.asarray(POINTS)
    expected = (forward(draw(seed=0), points)[-1] + forward(draw(seed=1), points)[-1]) / 2
    allclose(shown(forward, several, points), expected)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_weight_space_network_learns(network):
    """To double every weight, which the embedding and the readout alone could do, through all layers."""
    params, values = draw(), values_of(3)
    module = Editor(NETWORKS[network], POINTS).module(forward, params)
    several = jax.tree.map(lambda *x: jnp.stack(x), *(draw(seed=i) for i in range(8)))
    weights = module.init(jax.random.key(0), params, values)["params"]
    tx = optax.adam(1e-2)

    def loss(weights):
        edited = jax.vmap(lambda p: module.apply({"params": weights}, p, values))(several)
        return sum(((edited[k][:, 0] - 1.5 * several[k]) ** 2).mean() for k in several)

    @jax.jit
    def step(weights, state):
        updates, state = tx.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    before, state = loss(weights), tx.init(weights)
    for _ in range(300):
        weights, state = step(weights, state)
    assert loss(weights) < 0.5 * before


def saved(path, channels=3):
    params = draw((2, 5, 4, channels))
    editor = Editor(NETWORKS["gmn"], POINTS, READERS["gradmetanet"], heads=2, spreads=(0.5,) * 6)
    module = editor.module(forward, params)
    weights = random_weights(module, params, values_of(channels))
    save_editor(path, editor, forward, params, weights)
    return module, weights, params


def test_a_saved_editor_edits_as_before(tmp_path):
    module, weights, params = saved(tmp_path / "editor")
    loaded = load_editor(tmp_path / "editor", forward, jax.eval_shape(lambda: params))
    assert loaded.points.tolist() == [list(point) for point in POINTS]
    allclose(loaded(params, values_of(3)), module.apply({"params": weights}, params, values_of(3)))
    saved(tmp_path / "editor", channels=1)  # in its place
    load_editor(tmp_path / "editor", forward, draw((2, 5, 4, 1)))


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


def test_other_networks_and_images_are_refused_in_one_line(tmp_path):
    saved(tmp_path / "editor")
    for params, words in (
        (draw((2, 6, 4, 3)), "edits networks with the parameters ['b0'] [5], "),
        (draw((2, 5, 3)), "this one has ['b0'] [5], ['b1'] [3], ['w0'] [2, 5], ['w1'] [5, 3]"),
        (draw((2, 5, 4, 1)), "['w2'] [4, 1]"),
    ):
        with pytest.raises(EditorError) as error:
            load_editor(tmp_path / "editor", forward, params)
        assert words in one_line(error)
    loaded = load_editor(tmp_path / "editor", forward, draw())
    with pytest.raises(EditorError) as error:
        loaded(draw((2, 6, 4, 3)), values_of(3))
    assert "the editor edits networks with the parameters" in one_line(error)
    for values in (values_of(1), jnp.ones((4, 3)), jnp.ones(3)):
        with pytest.raises(EditorError) as error:
            loaded(draw(), values)
        assert "must be those of 3 points, 3 each" in one_line(error)


def test_damaged_files_are_refused_in_one_line(tmp_path):
    saved(tmp_path / "editor")
    config, weights = tmp_path / "editor" / "config.json", tmp_path / "editor" / "weights.safetensors"
    text, content = config.read_text(), weights.read_bytes()
    cases = [
        (text.replace('"heads": 2', '"heads": 3'), content, "not what was saved"),
        (text, content[:-1] + b"x", "not what was saved"),
        (text.replace("gmn_lopt editor", "something"), content, "does not describe an editor"),
        (
            text.replace('"version": 1,\n  "editor"', '"version": 2,\n  "editor"'),
            content,
            "has format version 2, this gmn_lopt reads version 1",
        ),
        (text.replace('"outputs": 3,', '"inputs": 3,'), content, "has the unknown entry 'inputs'"),
        ("{", content, "damaged or not JSON"),
    ]
    for config_text, weights_content, words in cases:
        config.write_text(config_text)
        weights.write_bytes(weights_content)
        with pytest.raises(EditorError) as error:
            load_editor(tmp_path / "editor", forward, draw())
        assert words in one_line(error), words
    with pytest.raises(EditorError, match="is missing"):
        load_editor(tmp_path / "nowhere", forward, draw())


def test_an_editor_is_not_saved_over_something_else(tmp_path):
    (tmp_path / "editor").mkdir()
    (tmp_path / "editor" / "thesis.txt").write_text("mine")
    with pytest.raises(EditorError, match="is not a saved editor"):
        saved(tmp_path / "editor")
    module, weights, params = saved(tmp_path / "good")
    bad = {**weights, "log_scale": jnp.float32(jnp.nan)}
    with pytest.raises(EditorError, match="log_scale with values that are not finite"):
        save_editor(tmp_path / "good", module.config, forward, params, bad)
    assert json.loads((tmp_path / "good" / "config.json").read_text())["outputs"] == 3


def test_networks_that_cannot_be_edited_are_refused_in_one_line():
    editor = Editor(NETWORKS["gmn"], POINTS)
    without_bias = lambda p, x: (x @ p["w"],)  # noqa: E731
    with pytest.raises(ValueError, match="every layer must have a bias"):
        editor.module(without_bias, {"w": jnp.ones((2, 3))})
    only_last = lambda p, x: forward(p, x)[-1:]  # noqa: E731
    with pytest.raises(ValueError, match="values of every layer"):
        editor.module(only_last, draw())
    with pytest.raises(ValueError, match="forward does not take these parameters and points"):
        editor.module(forward, draw((3, 4, 1)))
    with pytest.raises(ValueError, match="5 spreads for 6 parameters"):
        Editor(NETWORKS["gmn"], POINTS, spreads=(1.0,) * 5).module(forward, draw())
    twice = lambda w, x: jnp.sum(jnp.tanh(jnp.tanh(jnp.tanh(x @ w) @ w) @ w))  # noqa: E731
    recurrent = gmn_lopt.analyze(twice, jnp.ones((3, 3)), jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="an edge has two different ones"):
        GraphNetwork(4, 1).module(recurrent, 1)
    with pytest.raises(ValueError, match="as many coordinates"):
        Editor(NETWORKS["gmn"], ((0.0,), (0.0, 1.0)))
