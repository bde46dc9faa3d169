"""Saved learned optimizers come back unchanged, and damaged ones are refused in one line that names the file."""

import json
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from fuzz.saved import sign
from optimizing import analyzed, lively, mlp, small, with_coefficients

from gmn_lopt import (
    UNF,
    Additive,
    Denoised,
    Feedback,
    GradMetaNetConfig,
    GradMetaNetPlusPlusConfig,
    LearnedOptimizer,
    Muon,
    Normalized,
    PointwiseMLP,
    PowerLaw,
    Recipe,
    ScaleFree,
    SetReader,
)
from gmn_lopt.optimizers import saved as saved_module
from gmn_lopt.optimizers.saved import SerializationError, digest, load, load_learned, load_recipe, make_optimizer, save
from gmn_lopt.util import sealed

MODEL = mlp(5, 7, 4)
STRUCTURE = analyzed(MODEL)
RECIPES = {
    "sgdm": Recipe(),
    "ds": Recipe(Muon(), small(ScaleFree(), PointwiseMLP(12)), Normalized()),
    "unf+gmn": Recipe(residual=small(network=UNF(5), gradmetanet=SetReader(GradMetaNetConfig(width=6)))),
    "ds+gmn++": Recipe(residual=small(gradmetanet=SetReader(GradMetaNetPlusPlusConfig(6, 1, 3), 7, None, (0.5,)))),
    "denoised": Recipe(Denoised(), None, Additive(0.5), PowerLaw(0.1, feedback=Feedback())),
}


@pytest.fixture
def saved(tmp_path):
    lopt = LearnedOptimizer(STRUCTURE, residual=small(network=PointwiseMLP(4)))
    save(tmp_path / "saved", lopt, lively(lopt))
    return tmp_path / "saved"


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip(tmp_path, name):
    lopt = RECIPES[name].build(STRUCTURE)
    phi = lively(lopt)
    save(tmp_path / "deep" / "saved", lopt, phi)
    assert sorted(p.name for p in (tmp_path / "deep" / "saved").iterdir()) == ["config.json", "phi.safetensors"]

    other = analyzed(mlp(3, 6, 2) if name == "unf+gmn" else mlp(3, 6, 5, 2))
    loaded, weights = load_learned(str(tmp_path / "deep" / "saved"), other)
    assert loaded == RECIPES[name].build(other)
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
    lopt = LearnedOptimizer(STRUCTURE, residual=small(network=UNF(4)))
    save(tmp_path / "saved", lopt, lively(lopt))
    with pytest.raises(
        SerializationError, match=message + ".*meta-train it on this model, or use a PointwiseMLP"
    ) as error:
        load(tmp_path / "saved", analyzed(model))
    assert "\n" not in str(error.value)
    signed(edit_config("leaves", value=3))(tmp_path / "saved")
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
    lopt = LearnedOptimizer(STRUCTURE)
    save(saved, lopt, lopt.init(jax.random.key(0)))
    assert load_learned(saved, STRUCTURE)[0] == lopt
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_a_failing_save_leaves_what_was_there(saved, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    lopt = LearnedOptimizer(STRUCTURE)
    monkeypatch.setattr(saved_module.os, "fsync", fail)
    with pytest.raises(SerializationError, match="saved: No space left"):
        save(saved, lopt, lopt.init(jax.random.key(0)))
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_what_stepped_aside_for_another_is_loaded(saved):
    """Where a file system cannot exchange directories: the state between two renames, in which a kill may leave it."""
    expected = load_learned(saved, STRUCTURE)[0]
    saved.rename(saved.with_name(".saved.old-abcdefgh"))
    saved.with_name(".saved.old-empty123").mkdir()
    assert load_learned(saved, STRUCTURE)[0] == expected and load_recipe(saved) == Recipe.of(expected)
    with pytest.raises(SerializationError, match="other is neither a directory nor a shipped optimizer"):
        load(saved.with_name("other"), STRUCTURE)


def test_more_weights_than_can_be_loaded_are_not_saved(saved, monkeypatch):
    monkeypatch.setattr(sealed, "LARGEST_WEIGHTS", 1000)
    lopt = LearnedOptimizer(STRUCTURE, residual=small())
    with pytest.raises(SerializationError, match=r"cannot save .*saved: \d+ bytes of weights, more than 1000"):
        save(saved, lopt, lopt.init(jax.random.key(0)))


def test_nothing_else_is_overwritten(tmp_path):
    lopt = LearnedOptimizer(STRUCTURE)
    (tmp_path / "thesis.tex").write_text("years of work")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(SerializationError, match="not a saved optimizer"):
            save(path, lopt, lopt.init(jax.random.key(0)))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_is_not_finite_is_not_saved(tmp_path):
    lopt = LearnedOptimizer(STRUCTURE)
    phi = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), lopt.init(jax.random.key(0)))
    with pytest.raises(SerializationError, match=r"phi holds .* with values that are not finite"):
        save(tmp_path / "saved", lopt, phi)
    assert not (tmp_path / "saved").exists()


def test_meta_parameters_of_another_optimizer_are_not_saved(tmp_path):
    lopt = LearnedOptimizer(STRUCTURE, residual=small())
    with pytest.raises(SerializationError, match=r"phi lacks residual/log_beta"):
        save(tmp_path / "saved", lopt, LearnedOptimizer(STRUCTURE).init(jax.random.key(0)))
    assert not (tmp_path / "saved").exists()


def edit_config(*path, value):
    """Put a value at a place in config.json."""

    def edit(saved):
        config = json.loads((saved / "config.json").read_text())
        place = config
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (saved / "config.json").write_text(json.dumps(config))

    return edit


def edit_part(*path, value):
    return edit_config("optimizer", *path, value=value)


def signed(edit):
    """An edit after which the checksum is right again: not damage, but someone's work."""

    def edit_and_sign(saved):
        edit(saved)
        sign(saved)

    return edit_and_sign


def drop_from_config(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["optimizer"]["rule"]
    (saved / "config.json").write_text(json.dumps(config))


def flip_a_bit(file, place):
    def flip(saved):
        content = bytearray((saved / file).read_bytes())
        content[place] ^= 1
        (saved / file).write_bytes(content)

    return flip


def edit_weights(change):
    def edit(saved):
        arrays = safetensors.numpy.load_file(saved / "phi.safetensors")
        safetensors.numpy.save_file(change(arrays), saved / "phi.safetensors")

    return edit


def truncate(file, keep):
    return lambda saved: (saved / file).write_bytes((saved / file).read_bytes()[:keep])


ALPHA = "step_size/log_alpha"
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
        signed(edit_weights(lambda a: a | {"residual/network/kernel_1": np.zeros((4, 5), np.float32)})),
        r"phi.safetensors holds residual/network/kernel_1 with shape \(4, 5\).*needs \(4, 4\)",
    ),
    "wrong dtype": (
        signed(edit_weights(lambda a: a | {ALPHA: a[ALPHA].astype(np.float16)})),
        "phi.safetensors holds step_size/log_alpha as float16, not float32",
    ),
    "one too many": (signed(edit_weights(lambda a: a | {"extra": a[ALPHA]})), "phi.safetensors holds extra"),
    "one too few": (
        signed(edit_weights(lambda a: {k: v for k, v in a.items() if k != ALPHA})),
        "lacks step_size/log_alpha",
    ),
    "not a number": (
        signed(edit_weights(lambda a: a | {ALPHA: np.full((), np.nan, np.float32)})),
        "phi.safetensors holds step_size/log_alpha with values that are not finite",
    ),
    "other weights": (edit_weights(lambda a: a | {ALPHA: np.asarray(a[ALPHA] + 1)}), "not what was saved"),
    "a flipped bit": (flip_a_bit("phi.safetensors", -2), "not what was saved"),
    "truncated config": (truncate("config.json", 40), "config.json is damaged"),
    "binary config": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is damaged"),
    "nested config": (lambda d: (d / "config.json").write_text("[" * 10**5), "config.json is damaged"),
    "config is a list": (
        lambda d: (d / "config.json").write_text("[]"),
        "config.json is damaged: it does not hold an object",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "other format": (edit_config("format", value="else"), "config.json does not describe"),
    "old version": (edit_config("version", value=1), "version 1, .*reads version 2: it was saved by gmn_lopt 0.1"),
    "unknown version": (edit_config("version", value=99), "version 99, .*reads version 2: install the gmn_lopt"),
    "no architecture": (edit_config("optimizer", value=3), "config.json: optimizer must be an object, not 3"),
    "lacking entry": (drop_from_config, "config.json: optimizer lacks 'rule'"),
    "unknown entry": (edit_part("depth", value=3), "config.json: optimizer has the unknown entry 'depth'"),
    "unknown part": (
        edit_part("residual", "network", "name", value="ResNet"),
        "optimizer.residual.network must be one of PointwiseMLP, UNF, not 'ResNet'",
    ),
    "part of a later version": (edit_part("rule", "version", value=2), "optimizer.rule is version 2 of Additive"),
    "wrong type": (edit_part("residual", "network", "width", value=True), "width must be a whole number, not True"),
    "a list for a number": (
        edit_part("step_size", "initial", value=[1]),
        "initial must be a finite number, not a list",
    ),
    "not finite": (
        edit_part("step_size", "initial", value=float("nan")),
        "config.json is damaged or not JSON: NaN is not a",
    ),
    "huge": (
        edit_part("residual", "network", "hidden_layers", value=100000),
        "hidden_layers must be a whole",
    ),
    "other width": (
        signed(edit_part("residual", "network", "width", value=5)),
        r"phi.safetensors holds residual/network/\S+ with shape \(4,.*but.*needs \(5,",
    ),
    "very deep": (
        signed(edit_part("residual", "network", "hidden_layers", value=64)),
        "phi.safetensors holds 11 arrays, too few for 64 layers in config.json",
    ),
    "other start": (edit_part("residual", "weight", value=0.5), "not what was saved"),
    "unknown top entry": (edit_config("pickle", value=""), "config.json has the unknown entry 'pickle'"),
    "version as text": (edit_config("version", value="2"), "format version '2'"),
    "version as a fraction": (edit_config("version", value=2.0), "format version 2.0"),
    "a pipe": (lambda d: [(d / "config.json").unlink(), os.mkfifo(d / "config.json")], "config.json is not a regular"),
    "enormous": (lambda d: os.truncate(d / "phi.safetensors", 2**40), "has 1099511627776 bytes, more than the"),
    "GradMetaNet claimed": (edit_part("residual", "gradmetanet", value={"width": 3}), "one of SetReader, not None"),
}


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
    monkeypatch.setattr(saved_module.resources, "files", lambda _: tmp_path)
    with pytest.raises(SerializationError, match=r"no-such-optimizer.*\(those are shipped\)"):
        load("no-such-optimizer", STRUCTURE)
    lopt = LearnedOptimizer(STRUCTURE)
    (tmp_path / "pretrained" / "shipped").rmdir()
    save(tmp_path / "pretrained" / "shipped", lopt, lopt.init(jax.random.key(0)))
    assert load_learned("shipped", STRUCTURE)[0] == lopt


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SerializationError, match="not a directory"):
        load(tmp_path / "file", STRUCTURE)


def test_settings_reach_the_optimizer_and_others_are_refused(saved):
    grads = jax.tree.map(jnp.ones_like, MODEL[1])

    def first(**settings):
        tx = load(saved, STRUCTURE, **settings)
        return tx.update(grads, tx.init(MODEL[1]), MODEL[1])[0]

    plain = first(learning_rate=optax.constant_schedule(0.5))
    decayed = jax.tree.map(lambda u, p: u - 0.5 * 0.1 * p, plain, MODEL[1])
    chex.assert_trees_all_close(first(learning_rate=0.5, weight_decay=0.1), decayed, rtol=1e-5, atol=1e-7)
    for senseless in (float("nan"), -1, 1j, True, "fast", [0.1]):
        for name in ("learning_rate", "weight_decay"):
            with pytest.raises(SerializationError, match=rf"saved: {name} must be a finite number of at least 0, not "):
                make_optimizer(*load_learned(saved, STRUCTURE), {name: senseless}, "saved")  # tests check load's types
    with pytest.raises(
        SerializationError, match=r"saved does not take rate: it takes learning_rate, weight_decay, total_steps$"
    ):
        make_optimizer(*load_learned(saved, STRUCTURE), {"rate": 1.0}, "saved")
    with pytest.raises(SerializationError, match="saved: a mask says which parameters have weight decay: give weight_"):
        load(saved, STRUCTURE, mask=True)


def test_the_digest_is_that_of_the_values(saved):
    lopt, phi = load_learned(saved, STRUCTURE)
    assert digest(phi) == digest(lively(lopt)) == digest(jax.tree.map(np.asarray, phi))
    assert digest(phi) != digest(with_coefficients(phi, alpha=0.11))
    assert digest(phi) != digest({k: v for k, v in phi.items() if k != "step_size"})
