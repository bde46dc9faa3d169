"""Where optimizers under evaluation come from, and results on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gmn_lopt import analyze
from gmn_lopt.evaluation import sources
from gmn_lopt.evaluation.results import Results, ResultsError
from gmn_lopt.evaluation.sources import (
    SourceError,
    find_candidate,
    optax_transformation,
    parse_optax,
    split_label,
    split_settings,
)
from gmn_lopt.meta.task import Task
from gmn_lopt.optimizers import saved
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.optimizers.saved import save
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


def test_labels(tmp_path, monkeypatch):
    assert split_label("runs/a") == (None, "runs/a")
    assert split_label("after PES=runs/a") == ("after PES", "runs/a")
    assert split_label("optax:lion:learning_rate=3e-4") == (None, "optax:lion:learning_rate=3e-4")
    assert split_label("fast lion=optax:lion:learning_rate=1") == ("fast lion", "optax:lion:learning_rate=1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    assert split_label("lr=0.1") == (None, "lr=0.1")
    for spec in ("=runs/a", "name="):
        with pytest.raises(SourceError, match="LABEL=SOURCE"):
            split_label(spec)


def test_settings_of_a_learned_optimizer_are_no_label(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "shipped_names", lambda: ("default",))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for spec in ("default:learning_rate=0.003", "runs:learning_rate=1e-3,nesterov=True"):
        assert split_label(spec) == (None, spec)
        assert split_label(f"mine={spec}") == ("mine", spec)
    assert split_label("step:one=runs") == ("step:one", "runs")  # no such place: a label

    assert split_settings("default:learning_rate=3e-3") == ("default", {"learning_rate": 3e-3})
    assert split_settings("a:b:x=1, y='c:d=e'") == ("a:b", {"x": 1, "y": "c:d=e"})
    assert split_settings("runs/a") == ("runs/a", {})
    (tmp_path / "run:lr=1").mkdir()
    assert split_settings("run:lr=1") == ("run:lr=1", {})
    for bad in ("default:learning_rate=", "default:x=open('y')", "default:x=1,x=2", "default:x=1)+f(y=2"):
        with pytest.raises(SourceError, match="write default:key=value"):
            split_settings(bad)


class Tunable(LearnedOptimizer):
    def optimizer(self, phi, learning_rate=1.0):
        return optax.with_extra_args_support(optax.sgd(learning_rate))


def test_settings_make_other_candidates_of_one_optimizer(tmp_path, monkeypatch):
    task = tiny()
    structure = analyze(task.loss, task.init(None), task.sample(None, task.data["train"]))
    lopt = LearnedOptimizer(structure, backbone="sgdm")
    phi = lopt.init(jax.random.key(0))
    save(tmp_path / "one", lopt, phi)
    save(tmp_path / "two", lopt, jax.tree.map(lambda x: x + 1, phi))
    monkeypatch.setattr(saved, "LearnedOptimizer", Tunable)
    one = str(tmp_path / "one")
    candidates = []
    for spec in (one, f"{one}:learning_rate=0.5", f"fast={one}:learning_rate=2", f"{tmp_path / 'two'}:learning_rate=2"):
        candidates.append(find_candidate(spec, task, structure, candidates))
    assert [c.name for c in candidates] == ["one", "one(learning_rate=0.5)", "fast", "two(learning_rate=2)"]
    assert len({c.fingerprint for c in candidates}) == 4
    assert candidates[0].digest == candidates[1].digest == saved.digest(phi) != candidates[3].digest
    assert candidates[3].make is candidates[2].make is not candidates[1].make  # compiled once
    grads = {"w": jnp.ones(2)}
    steps = [c.make(c.hyper).update(grads, c.make(c.hyper).init(grads), grads)[0]["w"][0] for c in candidates]
    assert steps == [-1.0, -0.5, -2.0, -2.0]
    with pytest.raises(SourceError, match=r"does not take rate: it takes learning_rate$"):
        find_candidate(f"{one}:rate=1", task, structure)


def test_parsing_reads_literals():
    assert parse_optax("optax:lion:learning_rate=3e-4") == ("lion", {"learning_rate": 3e-4})
    assert parse_optax("optax:adam:b1=0.8,nesterov=True,betas=(1, 2),name='a,b'") == (
        "adam",
        {"b1": 0.8, "nesterov": True, "betas": (1, 2), "name": "a,b"},
    )
    assert parse_optax("optax:polyak_sgd") == ("polyak_sgd", {})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("optax:lion:3e-4", "key=value"),
        ("optax:lion:learning_rate=", "key=value"),
        ("optax:lion:learning_rate=open('x')", "literals"),
        ("optax:lion:learning_rate=1)+f(b=2", "key=value"),
        ("optax:lion:**{'learning_rate': 1}", "key=value"),
        ("optax:lionn:learning_rate=1", "did you mean lion"),
        ("optax::learning_rate=1", "no optimizer ''"),
        ("optax:_src:learning_rate=1", "no optimizer"),
        ("optax:lion.__init__:learning_rate=1", "no optimizer"),
        ("optax:lion:rate=1", "does not take these arguments"),
        ("optax:lion", "does not take these arguments"),
        ("optax:constant_schedule:value=1", "does not make an optimizer"),
        ("optax:sgd:learning_rate='fast'", "cannot train tiny"),
        ("nowhere/to/be/found", "nowhere/to/be/found"),
    ],
)
def test_bad_sources_end_in_one_line(spec, says):
    with pytest.raises(SourceError) as error:
        find_candidate(spec, tiny(), None)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_optax_optimizers_are_those_of_optax():
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, -2.0, 0.5])}
    for spec, tx in (
        ("optax:sgd:learning_rate=0.5,momentum=0.9", optax.sgd(0.5, 0.9)),
        ("optax:contrib.muon:learning_rate=0.1", optax.contrib.muon(0.1)),
    ):
        found = optax_transformation(spec)
        for one, other in zip(*(jax.tree.leaves(t.update(grads, t.init(params), params)) for t in (found, tx))):
            np.testing.assert_array_equal(one, other)
    assert find_candidate("optax:sgd:learning_rate=0.5", tiny(), None).name == "sgd(learning_rate=0.5)"
    assert find_candidate("mine=optax:sgd:learning_rate=0.5", tiny(), None).name == "mine"


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
    with pytest.raises(ResultsError, match="horizon was 6, is 7") as error:
        Results(tmp_path, {"seeds": [0], "horizon": 7})
    assert "seeds" not in str(error.value)
    assert results.load("a", "f") is not None
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ResultsError, match="not readable"):
        Results(tmp_path, {"seeds": [0], "horizon": 6})


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="another --out"):
        Results(tmp_path / "file" / "results", {})


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a"
    write_atomically(file, b"old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert file.read_bytes() == b"old"
