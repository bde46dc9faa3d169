"""The experiment on curvature: its targets, the symmetries of its methods, its files."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import permute
import pytest

import gmn_lopt
from experiments.curvature import data, report, train
from experiments.curvature.models import GMN, MODELS, OURS, SAVED, count
from experiments.curvature.problem import Problem, drawn
from gmn_lopt.util.errors import FileError, UsageError

DATA = data.DataConfig(width=5, points=6, target_points=40, train=12, valid=4, test=4)
FEW = train.Config(sizes=(8,), seeds=(1,), epochs=4, batch=4, validate_every=2, data=DATA)
SYMMETRIC = {"gradmetanet", "gradmetanet++", "weight-space, mean", *OURS}
NEURONS_ONLY = {"batch-asymmetric", "weight-space, all"}
SET_ONLY = {"neuron-asymmetric"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def splits(cache):
    return data.load(DATA, cache)


def output(weights, point, width):
    """One network's output, written out."""
    p = {name: np.asarray(x, np.float64) for name, x in data.as_tree(weights, width).items()}
    h = np.sin(np.sin(point * p["w1"][0] + p["b1"]) @ p["w2"] + p["b2"])
    return h @ p["w3"][:, 0] + p["b3"][0]


def test_networks_are_sirens(splits):
    weights, inputs, _ = splits["train"]
    found = data.summed_output(data.as_tree(weights[0], 5), inputs[0])
    np.testing.assert_allclose(found, sum(output(weights[0], float(x), 5) for x in inputs[0]), rtol=1e-4)
    assert abs(float(weights.mean())) < 0.15 and abs(float(weights.std()) - 1) < 0.1


def test_targets_are_the_squares_of_a_dense_jacobian():
    config = replace(DATA, train=3)
    key = jax.random.key(3)
    made = data.make(config, 3, key)
    p = jax.random.uniform(jax.random.split(key, 4)[1], (3,))
    points = data.draw_inputs(jax.random.split(key, 4)[3], p, config.target_points)
    for weights, own, target in zip(made.weights, points, made.targets):
        outputs = lambda w, own=own: jax.vmap(lambda x: data.summed_output(data.as_tree(w, 5), x[None]))(own)  # noqa: E731
        jacobian = np.asarray(jax.jacobian(outputs)(weights), np.float64)
        np.testing.assert_allclose(target, (jacobian**2).mean(0), rtol=1e-4, atol=1e-5)


def test_inputs_are_of_the_mixture():
    p = jnp.array([0.0, 0.25, 1.0])
    points = data.draw_inputs(jax.random.key(0), p, 4000)
    assert float(jnp.abs(points).max()) <= 1
    np.testing.assert_allclose((points < 0).mean(1), p, atol=0.03)
    np.testing.assert_allclose(jnp.abs(points).mean(1), 0.5, atol=0.03)


def test_the_standard_estimator_tends_to_the_target(cache):
    losses = []
    for points in (6, 600):
        config = replace(DATA, points=points, target_points=2000, train=8, valid=1, test=1)
        networks = data.load(config, cache)["train"]
        problem = Problem(config, networks)
        losses.append(float(jax.jit(lambda x, p=problem: p.mean_loss(None, None, x))(networks)))
    assert losses[1] < losses[0] / 10


@pytest.fixture(scope="module")
def problem(splits):
    return Problem(DATA, drawn(splits, 8, 1))


@pytest.mark.parametrize("name", MODELS)
def test_symmetries(name, problem, splits):
    run = train.Run(FEW, name, 1, problem, splits["valid"])
    noise = lambda x: x + 0.3 * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32)  # noqa: E731
    weights = jax.tree.map(noise, run.init().weights)  # all different
    network, points = (x[0] for x in splits["train"][:2])
    apply = jax.jit(lambda w, x: run.module.apply({"params": weights}, problem.inputs(w, x)))
    found = np.asarray(apply(network, points))
    permutations = permute.draw(problem.structure, 1)
    permuted = permute.parameters(problem.structure, permutations, data.as_tree(network, 5))
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    expected = flat(permute.parameters(problem.structure, permutations, data.as_tree(jnp.asarray(found), 5)))
    error = np.abs(np.asarray(apply(jnp.asarray(flat(permuted)), points)) - expected).max() / found.std()
    assert (error < 1e-3) if name in SYMMETRIC | NEURONS_ONLY else (error > 1e-2), "neurons"
    error = np.abs(np.asarray(apply(network, points[::-1])) - found).max() / found.std()
    assert (error < 1e-3) if name in SYMMETRIC | SET_ONLY else (error > 1e-2), "set"


def test_weights_are_about_15_000_where_the_input_allows(cache):
    config = train.Config(data=replace(DATA, width=32, points=128, target_points=2, train=2, valid=2, test=2))
    splits = data.load(config.data, cache)
    problem = Problem(config.data, splits["train"])
    for name in MODELS:
        run = train.Run(config, name, 1, problem, splits["valid"])
        counted = count(jax.eval_shape(run.init).weights)
        assert name == "mlp" or 13_500 <= counted <= 16_500, (name, counted)


def test_an_interrupted_run_ends_as_it_would_have(problem, splits, tmp_path):
    class Stop(Exception):
        pass

    class Bar:
        def __init__(self, after):
            self.left = after

        def update(self, n=1):
            self.left -= 1
            if self.left < 0:
                raise Stop

    run = train.Run(FEW, "neuron-asymmetric", 1, problem, splits["valid"])
    whole = run.train(tmp_path / "whole.npz", Bar(10))
    with pytest.raises(Stop):
        run.train(tmp_path / "cut.npz", Bar(1))
    resumed = train.Run(FEW, "neuron-asymmetric", 1, problem, splits["valid"]).train(tmp_path / "cut.npz", Bar(10))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("curvature")
    config = replace(FEW, out=out, cache=cache, models=("gradmetanet", "mlp"))
    train.main(config)
    return out, config


def test_what_is_finished_is_not_done_again(finished, monkeypatch):
    out, config = finished
    assert sorted(path.name for path in (out / "results").iterdir()) == ["gradmetanet-8-1.json", "mlp-8-1.json"]
    assert not list(out.glob("*.npz"))
    monkeypatch.setattr(train, "Run", None)
    train.main(config)


def test_report(finished, capsys):
    out, _ = finished
    text = report.main(report.Config(out))
    assert text in capsys.readouterr().out and (out / "report.md").read_text() == f"{text}\n"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows] == ["method", "---", "standard estimator", "gradmetanet", "mlp"]
    result = json.loads((out / "results" / "mlp-8-1.json").read_text())
    better = 100 * (1 - result["test"] / result["standard"])
    assert rows[4] == ["mlp", f"{result['weights']:,}", f"{result['test']:.4g} ({better:+.1f} %)"]
    assert (out / "fisher.png").stat().st_size > 10_000


def test_the_saved_predictor_is_what_was_trained(finished, problem, splits):
    out, _ = finished
    structure = data.structure_of(DATA)
    predict = gmn_lopt.load_predictor(out / "predictors" / "gradmetanet-8-1", structure)
    result = json.loads((out / "results" / "gradmetanet-8-1.json").read_text())
    target = problem.statistics["target"]
    predict = jax.jit(predict)
    losses = []
    for network, points, expected in zip(*splits["test"]):
        diagonal = predict(data.factors_of(network, points, 5))
        found = jnp.concatenate([x.ravel() for x in jax.tree.leaves(diagonal)])
        losses.append(float((((found - expected) / target["deviation"]) ** 2).mean()))
    np.testing.assert_allclose(np.mean(losses), result["test"], rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": ("dws",)}, "there is no method 'dws'"),
        ({"sizes": (13,)}, "--sizes 13 is more than the 12 networks for training"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"data": replace(DATA, points=0)}, "points must be at least 1"),
        ({"seeds": ()}, "--sizes and --seeds must not be empty"),
        ({"epochs": 6}, "holds results with another epochs"),
    ],
)
def test_impossible_settings_are_refused(finished, changes, says):
    with pytest.raises(UsageError) as error:
        train.main(replace(finished[1], **changes))
    assert says in str(error.value)


def test_damaged_files_are_refused(finished, tmp_path):
    config = finished[1]
    with pytest.raises(UsageError, match="holds no results"):
        report.main(report.Config(tmp_path))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text('{"model": "mlp"}')
    with pytest.raises(FileError, match="size is not there"):
        report.main(report.Config(tmp_path))
    (tmp_path / "damaged.npz").write_bytes(b"PK")
    with pytest.raises(FileError, match="damaged"):
        train.restore(tmp_path / "damaged.npz", None)
    for path in config.cache.glob("*.npz"):
        (tmp_path / path.name).write_bytes(b"nothing")
    with pytest.raises(FileError, match="is damaged; remove it"):
        data.load(DATA, tmp_path)


def test_the_quick_setting_keeps_what_is_asked_for():
    quick = train.checked(train.Config(quick=True, seeds=(4,)))
    assert quick.seeds == (4,) and quick.epochs == train.QUICK["epochs"] and quick.data.width < 32
    assert set(SAVED) <= set(MODELS) and SAVED["gradmetanet"].network == GMN
