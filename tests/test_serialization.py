"""Saved learned optimizers come back unchanged, and damaged ones are refused in one line that names the file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from optimizing import analyzed, lively, mlp

from gmn_lopt.networks.gradmetanet import GradMetaNetConfig
from gmn_lopt.optimizers import saved as serialization
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.optimizers.saved import SerializationError, digest, load, load_learned, save

MODEL = mlp(5, 7, 4)
STRUCTURE = analyzed(MODEL)
OPTIONS = {
    "sgdm": {"backbone": "sgdm"},
    "ds": {"gradmetanet": None, "width": 12},
    "unf+gmn": {"backbone": "unf", "gradmetanet": GradMetaNetConfig(width=6), "width": 5, "gate": True},
    "ds+gmn++": {"gradmetanet": GradMetaNetConfig(width=6, set_layers=1, attention_heads=3)},
    "ds+gmn": {
        "gradmetanet": GradMetaNetConfig(width=6, set_layers=1, use_parameter=True, factor_decays=(0.5,)),
        "base": "adam",
    },
}


@pytest.fixture
def saved(tmp_path):
    lopt = LearnedOptimizer(STRUCTURE, gradmetanet=None, width=4)
    save(tmp_path / "saved", lopt, lively(lopt))
    return tmp_path / "saved"


@pytest.mark.parametrize("name", OPTIONS)
def test_round_trip(tmp_path, name):
    lopt = LearnedOptimizer(STRUCTURE, **OPTIONS[name])
    phi = lively(lopt)
    save(tmp_path / "deep" / "saved", lopt, phi)
    assert sorted(p.name for p in (tmp_path / "deep" / "saved").iterdir()) == ["config.json", "phi.safetensors"]

    other = analyzed(mlp(3, 6, 2) if name == "unf+gmn" else mlp(3, 6, 5, 2))
    loaded, weights = load_learned(str(tmp_path / "deep" / "saved"), other)
    assert loaded == LearnedOptimizer(other, **OPTIONS[name])
    assert jax.tree.structure(weights) == jax.tree.structure(phi)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(phi)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mlp(5, 7, 4, 4), r"leaf 4 was missing there and is \[2\]\['b'\] over spaces \(3,\) in this model"),
        (mlp(5, 7), r"leaf 2 was \[1\]\['b'\] over spaces \(2,\) there and is missing in this model"),
        (mlp(1, 7, 4), r"leaf 1 was \[0\]\['w'\] over spaces \(1, 0\) there and is \[0\]\['w'\] over spaces \(0,\)"),
    ],
    ids=["deeper", "shallower", "fewer axes"],
)
def test_unf_is_not_loaded_for_another_model(tmp_path, model, message):
    lopt = LearnedOptimizer(STRUCTURE, backbone="unf", gradmetanet=None, width=4)
    save(tmp_path / "saved", lopt, lively(lopt))
    with pytest.raises(SerializationError, match=message + ".*meta-train unf on this model, or use ds") as error:
        load(tmp_path / "saved", analyzed(model))
    assert "\n" not in str(error.value)
    edit_config(leaves=3)(tmp_path / "saved")
    with pytest.raises(SerializationError, match=r'config.json: "leaves" is missing or damaged'):
        load(tmp_path / "saved", STRUCTURE)


def test_load_gives_the_transformation(saved):
    tx = load(saved, STRUCTURE)
    grads = jax.tree.map(jnp.ones_like, MODEL[1])
    updates, _ = tx.update(grads, tx.init(MODEL[1]), MODEL[1])
    lopt, phi = load_learned(saved, STRUCTURE)
    expected, _ = lopt.optimizer(phi).update(grads, tx.init(MODEL[1]), MODEL[1])
    assert all(np.array_equal(a, b) and np.any(a) for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected)))


def test_saving_again_replaces_all_of_it(saved):
    lopt = LearnedOptimizer(STRUCTURE, backbone="sgdm")
    save(saved, lopt, lopt.init(jax.random.key(0)))
    assert load_learned(saved, STRUCTURE)[0] == lopt
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_a_failing_save_leaves_what_was_there(saved, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    lopt = LearnedOptimizer(STRUCTURE, backbone="sgdm")
    monkeypatch.setattr(serialization.os, "fsync", fail)
    with pytest.raises(SerializationError, match="saved: No space left"):
        save(saved, lopt, lopt.init(jax.random.key(0)))
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_nothing_else_is_overwritten(tmp_path):
    lopt = LearnedOptimizer(STRUCTURE, backbone="sgdm")
    (tmp_path / "thesis.tex").write_text("years of work")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(SerializationError, match="not a saved optimizer"):
            save(path, lopt, lopt.init(jax.random.key(0)))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_meta_parameters_of_another_optimizer_are_not_saved(tmp_path):
    lopt = LearnedOptimizer(STRUCTURE, gradmetanet=None)
    with pytest.raises(SerializationError, match=r"phi lacks backbone/bias_0"):
        save(tmp_path / "saved", lopt, LearnedOptimizer(STRUCTURE, backbone="sgdm").init(jax.random.key(0)))
    assert not (tmp_path / "saved").exists()


def edit_config(**changes):
    def edit(saved):
        config = json.loads((saved / "config.json").read_text())
        for key, value in changes.items():
            (config if key in config else config["optimizer"])[key] = value
        (saved / "config.json").write_text(json.dumps(config))

    return edit


def drop_from_config(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["optimizer"]["base"]
    (saved / "config.json").write_text(json.dumps(config))


def edit_weights(change):
    def edit(saved):
        arrays = safetensors.numpy.load_file(saved / "phi.safetensors")
        safetensors.numpy.save_file(change(arrays), saved / "phi.safetensors")

    return edit


def truncate(file, keep):
    return lambda saved: (saved / file).write_bytes((saved / file).read_bytes()[:keep])


DAMAGE = {
    "empty weights": (truncate("phi.safetensors", 0), "phi.safetensors is damaged"),
    "truncated header": (truncate("phi.safetensors", 20), "phi.safetensors is damaged"),
    "truncated weights": (truncate("phi.safetensors", -1), "phi.safetensors is damaged"),
    "a pickle": (
        lambda d: (d / "phi.safetensors").write_bytes(b"\x80\x04cos\nsystem\n."),
        "phi.safetensors is damaged",
    ),
    "no weights": (lambda d: (d / "phi.safetensors").unlink(), "phi.safetensors is missing"),
    "wrong shape": (
        edit_weights(lambda a: a | {"backbone/kernel_1": np.zeros((4, 5), np.float32)}),
        r"phi.safetensors holds backbone/kernel_1 with shape \(4, 5\).*needs \(4, 4\)",
    ),
    "wrong dtype": (
        edit_weights(lambda a: a | {"log_alpha": a["log_alpha"].astype(np.float16)}),
        "phi.safetensors holds log_alpha as float16, not float32",
    ),
    "one too many": (edit_weights(lambda a: a | {"extra": a["log_alpha"]}), "phi.safetensors holds extra"),
    "one too few": (
        edit_weights(lambda a: {k: v for k, v in a.items() if k != "log_alpha"}),
        "lacks log_alpha",
    ),
    "truncated config": (truncate("config.json", 40), "config.json is damaged"),
    "binary config": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is damaged"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "config.json does not describe"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "other format": (edit_config(format="else"), "config.json does not describe"),
    "unknown version": (edit_config(version=99), "config.json has format version 99.*reads version 1"),
    "no architecture": (edit_config(optimizer=3), "config.json.*missing or not an object"),
    "lacking entry": (drop_from_config, "config.json.*lacks base"),
    "unknown entry": (edit_config(depth=3), "config.json.*unknown entry depth"),
    "unknown backbone": (edit_config(backbone="resnet"), "config.json: unknown backbone 'resnet'"),
    "wrong type": (edit_config(width=True), "config.json: width must be a whole number.*not True"),
    "other width": (edit_config(width=5), r"phi.safetensors holds backbone/\S+ with shape \(4,.*but.*needs \(5,"),
    "other base": (edit_config(base="adam"), "phi.safetensors holds log_one_minus_mu"),
    "GradMetaNet claimed": (edit_config(gradmetanet={"width": 3}), "config.json.*lacks .*neuron_layers"),
}


def test_what_was_saved_before_a_setting_came_still_loads(saved):
    before = load_learned(saved, STRUCTURE)[0]
    config = json.loads((saved / "config.json").read_text())
    places = {"optimizer": config["optimizer"], "gradmetanet": config["optimizer"]["gradmetanet"]}
    for place, settings in serialization.ADDED.items():
        for name in settings if places[place] else ():
            del places[place][name]
    (saved / "config.json").write_text(json.dumps(config))
    assert load_learned(saved, STRUCTURE)[0] == before


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(saved, damage):
    do, message = DAMAGE[damage]
    do(saved)
    with pytest.raises(SerializationError, match=message) as error:
        load(saved, STRUCTURE)
    assert "\n" not in str(error.value) and str(saved) in str(error.value)


def test_unknown_names_list_what_there_is(tmp_path, monkeypatch):
    with pytest.raises(SerializationError, match="no-such-optimizer"):
        load("no-such-optimizer", STRUCTURE)
    (tmp_path / "pretrained" / "shipped").mkdir(parents=True)
    monkeypatch.setattr(serialization.resources, "files", lambda _: tmp_path)
    with pytest.raises(SerializationError, match=r"no-such-optimizer.*\(those are shipped\)"):
        load("no-such-optimizer", STRUCTURE)
    lopt = LearnedOptimizer(STRUCTURE, backbone="sgdm")
    (tmp_path / "pretrained" / "shipped").rmdir()
    save(tmp_path / "pretrained" / "shipped", lopt, lopt.init(jax.random.key(0)))
    assert load_learned("shipped", STRUCTURE)[0] == lopt


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SerializationError, match="not a directory"):
        load(tmp_path / "file", STRUCTURE)


class Tunable(LearnedOptimizer):
    """A learned optimizer that takes settings, as rules with a learning rate of the user's do."""

    def optimizer(self, phi, learning_rate=None, weight_decay=0.0):
        if weight_decay < 0:
            raise ValueError("weight_decay must not be negative\nin detail")
        decay = optax.add_decayed_weights(weight_decay)
        return optax.with_extra_args_support(optax.chain(decay, optax.scale_by_learning_rate(learning_rate)))


def test_settings_reach_an_optimizer_that_takes_them(saved, monkeypatch):
    monkeypatch.setattr(serialization, "LearnedOptimizer", Tunable)
    params, grads = jnp.array([2.0]), jnp.array([1.0])
    tx = load(saved, STRUCTURE, learning_rate=optax.constant_schedule(0.5), weight_decay=0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates, [-0.5 * (1.0 + 0.1 * 2.0)], rtol=1e-6)
    with pytest.raises(SerializationError, match=r"saved does not take rate: it takes learning_rate, weight_decay$"):
        load(saved, STRUCTURE, rate=1.0)
    with pytest.raises(SerializationError, match=r"saved: weight_decay must not be negative$"):
        load(saved, STRUCTURE, learning_rate=0.5, weight_decay=-1.0)


def test_settings_that_an_optimizer_does_not_take_are_refused(saved, monkeypatch):
    monkeypatch.setattr(LearnedOptimizer, "optimizer", lambda self, phi: optax.identity())
    with pytest.raises(SerializationError, match=r"saved does not take momentum, rate: it takes no settings$"):
        load(saved, STRUCTURE, momentum=0.9, rate=1.0)


def test_the_digest_is_that_of_the_values(saved):
    lopt, phi = load_learned(saved, STRUCTURE)
    assert digest(phi) == digest(lively(lopt)) == digest(jax.tree.map(np.asarray, phi))
    assert digest(phi) != digest(phi | {"log_alpha": phi["log_alpha"] + 1e-3})
    assert digest(phi) != digest({k: v for k, v in phi.items() if k != "log_alpha"})
