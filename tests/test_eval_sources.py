"""Where optimizers under evaluation come from, and results on disk."""

import doctest
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gmn_lopt import analyze
from gmn_lopt.evaluation import sources
from gmn_lopt.evaluation.results import Results
from gmn_lopt.evaluation.sources import find_candidates, optax_transformation, parse_source
from gmn_lopt.meta.task import Task
from gmn_lopt.optimizers import saved
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.optimizers.saved import save
from gmn_lopt.util.errors import UsageError
from gmn_lopt.util.files import write_atomically


def tiny() -> Task:
    return Task(
        name="tiny",
        horizon=4,
        batch_size=2,
        loss_cap=10.0,
        data={"train": jnp.arange(3.0), "test": jnp.ones(2)},
        init=lambda key: {"w": jnp.ones(2)},
        loss=lambda params, batch: jnp.sum(params["w"] ** 2) + 0 * batch.sum(),
        sample=lambda key, split: split[:2],
    )


def test_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("lr=0.1", "run:lr=1"):
        (tmp_path / place).mkdir()
    rate = {"learning_rate": 3e-4}
    for spec, expected in {
        "runs/a": (None, "runs/a", "runs/a", {}),
        "after PES=runs/a": ("after PES", "runs/a", "runs/a", {}),
        "default:learning_rate=3e-4": (None, "default:learning_rate=3e-4", "default", rate),
        "mine = default:learning_rate=3e-4": ("mine", "default:learning_rate=3e-4", "default", rate),
        "optax:lion:learning_rate=3e-4": (None, "optax:lion:learning_rate=3e-4", "optax:lion", rate),
        "fast=optax:lion:learning_rate=3e-4": ("fast", "optax:lion:learning_rate=3e-4", "optax:lion", rate),
        "optax:polyak_sgd": (None, "optax:polyak_sgd", "optax:polyak_sgd", {}),
        # Paths that exist as written.
        "lr=0.1": (None, "lr=0.1", "lr=0.1", {}),
        "run:lr=1": (None, "run:lr=1", "run:lr=1", {}),
        "mine=run:lr=1": ("mine", "run:lr=1", "run:lr=1", {}),
    }.items():
        assert parse_source(spec) == expected
    assert doctest.testmod(sources) == (0, 1)


def test_settings_make_other_candidates_of_one_optimizer(tmp_path):
    task = tiny()
    structure = analyze(task.loss, task.init(None), task.sample(None, task.data["train"]))
    lopt = LearnedOptimizer(structure)
    phi = lopt.init(jax.random.key(0))
    save(tmp_path / "one", lopt, phi)
    save(tmp_path / "two", lopt, jax.tree.map(lambda x: x + 1, phi))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    specs = (
        one,
        f"{one}:learning_rate=0.5",
        f"fast={one}:learning_rate=2.0",
        f"{two}:learning_rate=2.0,weight_decay=0.5",
    )
    candidates = find_candidates([*specs, f"other={two}:learning_rate=2.0"], task)
    assert [c.name for c in candidates] == [
        *("one", "one(learning_rate=0.5)", "fast", "two(learning_rate=2.0, weight_decay=0.5)", "other")
    ]
    assert len({c.fingerprint for c in candidates}) == 5
    assert candidates[0].digest == candidates[1].digest == saved.digest(phi) != candidates[3].digest
    assert candidates[4].make is candidates[2].make is not candidates[1].make  # compiled once
    grads, params = {"w": jnp.full(2, 10.0)}, {"w": jnp.ones(2)}
    steps = [c.make(c.hyper).update(grads, c.make(c.hyper).init(params), params)[0]["w"][0] for c in candidates]
    np.testing.assert_allclose(np.divide(steps[1:3], steps[0]), [5, 20], rtol=1e-6)  # the learned step size is 0.1
    np.testing.assert_allclose(steps[3] - steps[4], -2 * 0.5 * 1, rtol=1e-5)
    with pytest.raises(UsageError, match=r"does not take rate: it takes learning_rate, weight_decay, total_steps$"):
        find_candidates([f"{one}:rate=1"], task)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("optax:lion:3e-4", "write optax:NAME:setting=value"),
        ("optax:lion:learning_rate=", "write optax:lion:setting=value"),
        ("optax:lion:learning_rate=open('x')", "literals"),
        ("optax:lion:**{'learning_rate': 1}", "write optax:NAME:setting=value"),
        ("=runs/a", "LABEL=NAME"),
        ("optax:lionn:learning_rate=1", "did you mean lion"),
        ("optax::learning_rate=1", "no optimizer ''"),
        ("optax:_src:learning_rate=1", "no optimizer"),
        ("optax:lion.__init__:learning_rate=1", "no optimizer"),
        ("optax:lion:rate=1", "does not take these arguments"),
        ("optax:lion", "does not take these arguments"),
        ("optax:constant_schedule:value=1", "does not make an optimizer"),
        ("optax:sgd:learning_rate='fast'", "learning_rate must be a finite number of at least 0, not 'fast'"),
        ("nowhere/to/be/found", "nowhere/to/be/found"),
    ],
)
def test_bad_sources_end_in_one_line(spec, says):
    with pytest.raises(UsageError) as error:
        find_candidates([spec], tiny())
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_optax_optimizers_are_those_of_optax():
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, -2.0, 0.5])}
    for name, settings, tx in (
        ("optax:sgd", {"learning_rate": 0.5, "momentum": 0.9}, optax.sgd(0.5, 0.9)),
        ("optax:contrib.muon", {"learning_rate": 0.1}, optax.contrib.muon(0.1)),
    ):
        found = optax_transformation(name, settings)
        for one, other in zip(*(jax.tree.leaves(t.update(grads, t.init(params), params)) for t in (found, tx))):
            np.testing.assert_array_equal(one, other)
    names = [
        c.name for c in find_candidates([f"{label}optax:sgd:learning_rate=0.5" for label in ("", "mine=")], tiny())
    ]
    assert names == ["sgd(learning_rate=0.5)", "mine"]


def test_results_come_back_only_for_the_same_optimizer(tmp_path):
    results = Results(tmp_path / "a" / "b", {"seeds": [0, 1]})
    arrays = {"x": np.arange(6.0).reshape(2, 3), "empty": np.zeros((2, 0))}
    results.save("after/PES: 1", "abc", arrays)
    results.save("after PES- 1", "abc", {"x": np.zeros(1)})  # another name, though alike in a file name
    again = Results(tmp_path / "a" / "b", {"seeds": (0, 1)})
    loaded = again.load("after/PES: 1", "abc")
    assert loaded is not None
    assert loaded.keys() == arrays.keys()
    np.testing.assert_array_equal(loaded["x"], arrays["x"])
    assert again.load("after/PES: 1", "abd") is None
    assert again.load("another", "abc") is None


def test_a_damaged_result_is_computed_again(tmp_path):
    results = Results(tmp_path, {})
    results.save("a", "f", {"x": np.arange(1000.0)})
    (file,) = tmp_path.glob("*.npz")
    whole = file.read_bytes()
    for content in (whole[:-200], whole[:10], b"", b"no archive"):
        file.write_bytes(content)
        assert results.load("a", "f") is None


def test_another_configuration_is_refused_with_the_differences(tmp_path):
    Results(tmp_path, {"seeds": [0], "horizon": 5})
    results = Results(tmp_path, {"seeds": [0], "horizon": 6})  # nothing there yet: nothing to protect
    results.save("a", "f", {"x": np.zeros(1)})
    with pytest.raises(UsageError, match="horizon was 6, is 7") as error:
        Results(tmp_path, {"seeds": [0], "horizon": 7})
    assert "seeds" not in str(error.value)
    assert results.load("a", "f") is not None
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UsageError, match=r"settings.json is damaged or not JSON: .* choose another --out"):
        Results(tmp_path, {"seeds": [0], "horizon": 6})


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="another --out"):
        Results(tmp_path / "file" / "results", {})


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a"
    write_atomically(file, b"old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert file.read_bytes() == b"old"


def test_what_a_killed_evaluation_left_is_removed_and_what_another_one_writes_is_not(tmp_path):
    directory = tmp_path / "results"
    directory.mkdir()
    litter = [directory / ".a.npz.12.partial", tmp_path / ".report.json.12.partial"]
    kept = [directory / ".b.npz.13.partial", directory / "c.partial"]
    for file in (*litter, *kept):
        file.write_bytes(b"half")
    for file in (*litter, kept[1]):
        os.utime(file, (0, 0))
    Results(directory, {})
    assert not any(file.exists() for file in litter) and all(file.exists() for file in kept)
