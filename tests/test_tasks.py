"""Every task: what it promises to meta-training and evaluation, without a network."""

import ast
import functools
import importlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gmn_lopt.tasks
from gmn_lopt.tasks import linear_regression, load_task, task_names
from gmn_lopt.tasks.data.cache import DataError
from gmn_lopt.tasks.digits_mlp import shift
from gmn_lopt.tasks.mixture import make_all

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "tfds"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no prepared TensorFlow Datasets directory {REAL}")

IMAGE_TASKS = {  # name: (TFDS name, features, classes, hidden width, training split, test split)
    "fashion_mnist_mlp": ("fashion_mnist", 64, 10, 32, 60, 10),
    "cifar10_mlp": ("cifar10", 192, 10, 32, 50, 10),
    "cifar100_mlp": ("cifar100", 192, 100, 128, 200, 100),
}
HORIZONS = {name: 2000 for name in IMAGE_TASKS} | {
    "digits_mlp": 500,
    "linear_regression": 10,
    "tabular_mlp": 500,
}
NAMES = sorted(HORIZONS)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache with small made-up arrays for every downloaded data set; the first pixel of image i is i / 1000."""
    directory = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    for name, features, classes, _, *sizes in IMAGE_TASKS.values():
        arrays = {}
        for split, size in zip(("train", "test"), sizes):
            arrays[f"{split}_image"] = rng.random((size, features), np.float32)
            arrays[f"{split}_image"][:, 0] = np.arange(size) / 1000
            arrays[f"{split}_label"] = (np.arange(size) % classes).astype(np.int32)
        np.savez(directory / f"{name}-8x8.npz", **arrays, version=1, source="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GMN_LOPT_CACHE", str(directory))
        yield


@pytest.fixture(scope="module")
def started(cache):
    """For a name: the task, its jitted sample, parameters and a batch. Compiling is most of these tests' time."""

    @functools.cache
    def start(name):
        task = load_task(name)
        sample = jax.jit(task.sample)
        return task, sample, jax.jit(task.init)(jax.random.key(2)), sample(jax.random.key(0), task.data["train"])

    return start


# The loss on the first batch and its gradient's norm, as they were before the tasks shared their code.
RECORDED = {
    "digits_mlp": (2.367811, 0.380924),
    "digits_mlp:augment=False:hidden=(8, 4):batch_size=7": (2.263936, 0.677812),
    "linear_regression": (30.454382, 23.602468),
    "tabular_mlp": (0.526203, 1.354803),
    "tabular_mlp:data='wine'": (0.91143, 1.45289),
    "tabular_mlp:data='diabetes'": (1.149474, 3.118706),
}
RECORDED_ON_REAL_DATA = {
    "cifar10_mlp": (2.355264, 0.794779),
    "cifar10_mlp:hidden=(16, 8):batch_size=9": (2.305825, 1.328034),
    "cifar100_mlp": (4.643597, 0.591365),
    "fashion_mnist_mlp": (2.383257, 0.492478),
    "lm1b_transformer": (7.489137, 2.505514),
}
RECORDED_OF_THE_MIXTURE = {
    "digits-0": (2.306571, 0.470425),
    "digits-1": (2.304209, 1.250808),
    "digits-2": (0.251241, 0.339161),
    "fashion_mnist-4": (2.303422, 0.130498),
    "fashion_mnist-6": (1.472079, 1.375349),
    "cifar10-9": (16.493889, 50.401691),
    "cifar100-12": (4.591906, 0.523498),
}


def first_loss(task):
    params, batch = task.init(jax.random.key(0)), task.sample(jax.random.key(1), task.data["train"])
    loss, gradient = jax.value_and_grad(task.loss)(params, batch)
    return float(loss), float(optax.tree.norm(gradient))


def check_recorded(spec, data_dir, expected):
    name, *settings = spec.split(":")
    settings = dict(setting.split("=") for setting in settings)
    task = load_task(name, data_dir, **{key: ast.literal_eval(value) for key, value in settings.items()})
    assert first_loss(task) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("spec", RECORDED)
def test_recorded_numbers(spec):
    check_recorded(spec, None, RECORDED[spec])


def test_recorded_loss_of_the_transformer():
    """On tokens that do not depend on the version of Python, as the text does."""
    task, tokens = load_task("text_transformer"), jnp.arange(64).reshape(8, 8)
    loss = task.loss(task.init(jax.random.key(0)), {"input": tokens, "target": tokens * 7 % 128})
    assert float(loss) == pytest.approx(5.345244, rel=1e-5)


@needs_real_data
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_recorded_numbers_on_real_data(tmp_path, monkeypatch):
    monkeypatch.setenv("GMN_LOPT_CACHE", str(tmp_path))
    for spec, expected in RECORDED_ON_REAL_DATA.items():
        check_recorded(spec, str(REAL), expected)
    mixture = {task.name: task for task in make_all(str(REAL))}
    assert len(mixture) == 14
    for name, expected in RECORDED_OF_THE_MIXTURE.items():
        assert first_loss(mixture[name]) == pytest.approx(expected, rel=1e-5), name
    assert mixture["digits-2"].loss_cap == pytest.approx(0.3516813889)


def test_recorded_numbers_of_the_mixture():
    """Those members of the mixture whose data come with scikit-learn."""
    mixture = {task.name: task for task in make_all()}  # the others on made-up images
    for name in ("digits-0", "digits-1", "digits-2"):
        assert first_loss(mixture[name]) == pytest.approx(RECORDED_OF_THE_MIXTURE[name], rel=1e-5), name


def test_names():
    assert set(NAMES) <= set(task_names())
    assert not [name for name in task_names() if name.startswith("_")]


@pytest.mark.parametrize("name", NAMES)
def test_task_trains(started, name):
    task, sample, params, batch = started(name)
    size = 64 if name == "tabular_mlp" else 128
    assert (task.name, task.horizon, task.batch_size) == (name, HORIZONS[name], size)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(dict(task.data)))

    assert jax.tree.structure(batch) == jax.tree.structure(task.data["train"])
    for drawn, kept in zip(jax.tree.leaves(batch), jax.tree.leaves(task.data["train"])):
        assert drawn.shape == (size, *kept.shape[1:]) and drawn.dtype == kept.dtype
    other = sample(jax.random.key(1), task.data["train"])
    assert not np.array_equal(jax.tree.leaves(batch)[0], jax.tree.leaves(other)[0])

    loss_of = jax.jit(task.loss)
    loss, gradient = jax.jit(jax.value_and_grad(task.loss))(params, batch)
    assert loss.shape == () and jnp.isfinite(loss)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    descended = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient)
    assert loss_of(descended, batch) < loss
    assert jnp.isfinite(loss_of(params, task.data["test"]))  # evaluation takes the whole split


@pytest.mark.parametrize("name", ["digits_mlp", *IMAGE_TASKS])
def test_classifier(started, name):
    _, features, classes, width, *_ = IMAGE_TASKS.get(name, ("", 64, 10, 32))
    task, _, params, batch = started(name)
    assert task.loss_cap == pytest.approx(1.5 * math.log(classes))
    shapes = {path: {k: v.shape for k, v in layer.items()} for path, layer in params.items()}
    assert shapes == {
        "layer_0": {"kernel": (features, width), "bias": (width,)},
        "layer_1": {"kernel": (width, classes), "bias": (classes,)},
    }
    # The model once more, in NumPy and from the definition.
    first, second = (jax.tree.map(np.asarray, params[layer]) for layer in ("layer_0", "layer_1"))
    image, label = np.asarray(batch["image"], np.float64), np.asarray(batch["label"])
    assert image.min() >= 0 and image.max() <= 1
    logits = np.maximum(image @ first["kernel"] + first["bias"], 0) @ second["kernel"] + second["bias"]
    chosen = logits[np.arange(len(label)), label]
    expected = np.mean(np.log(np.exp(logits).sum(1)) - chosen)
    np.testing.assert_allclose(jax.jit(task.loss)(params, batch), expected, rtol=1e-5)


def test_initialisation():
    params = jax.jit(load_task("cifar10_mlp", hidden=(500, 400)).init)(jax.random.key(0))
    for layer, fan_in in zip(("layer_0", "layer_1"), (192, 500)):
        kernel = np.asarray(params[layer]["kernel"])
        np.testing.assert_allclose(kernel.std(), 1 / math.sqrt(fan_in), rtol=0.02)
        assert np.abs(kernel).max() < 2.3 / math.sqrt(fan_in)  # cut at 2 of the deviations before the correction
        assert not np.any(params[layer]["bias"])


@pytest.mark.parametrize("name", ["digits_mlp", *IMAGE_TASKS])
@pytest.mark.parametrize("hidden", [(), (7,), (16, 8, 4)])
def test_other_widths_and_depths(name, hidden):
    task = load_task(name, hidden=hidden, batch_size=5, horizon=7)
    assert (task.horizon, task.batch_size) == (7, 5)
    params = jax.eval_shape(task.init, jax.random.key(0))
    classes = 100 if name == "cifar100_mlp" else 10
    assert [params[f"layer_{i}"]["kernel"].shape[1] for i in range(len(params))] == [*hidden, classes]
    batch = jax.eval_shape(task.sample, jax.random.key(1), task.data["train"])
    assert batch["image"].shape == (5, task.data["train"]["image"].shape[1])
    assert jax.eval_shape(task.loss, params, batch).shape == ()


@pytest.mark.parametrize("name", list(IMAGE_TASKS))
def test_image_splits(name):
    *_, training, test = IMAGE_TASKS[name]
    data = load_task(name).data
    number = {split: np.round(arrays["image"][:, 0] * 1000).astype(int) for split, arrays in data.items()}
    np.testing.assert_array_equal(number["train"], np.arange(training * 4 // 5))
    np.testing.assert_array_equal(number["valid"], np.arange(training * 4 // 5, training))
    np.testing.assert_array_equal(number["test"], np.arange(test))


def test_batches_are_drawn_by_index_with_replacement():
    task = load_task("fashion_mnist_mlp")
    train = task.data["train"]
    batch = task.sample(jax.random.key(0), train)  # outside jit, and from arrays on the host
    number = np.round(np.asarray(batch["image"][:, 0]) * 1000).astype(int)
    np.testing.assert_array_equal(batch["image"], train["image"][number])
    np.testing.assert_array_equal(batch["label"], train["label"][number])
    assert len(set(number)) < 48  # 128 of 48 images: some more than once, and not all of them every time
    many = jax.jit(jax.vmap(task.sample, (0, None)))(jax.random.split(jax.random.key(1), 20), train)
    assert set(np.round(np.asarray(many["image"][..., 0]) * 1000).ravel().astype(int)) == set(range(48))


def test_digits_splits():
    from sklearn.datasets import load_digits

    data = load_task("digits_mlp").data
    assert {split: len(arrays["label"]) for split, arrays in data.items()} == {"train": 1149, "valid": 288, "test": 360}
    rows = [
        (label, *np.round(image * 16).astype(int).tolist())
        for arrays in data.values()
        for image, label in zip(arrays["image"], arrays["label"].tolist())
    ]
    images, labels = load_digits(return_X_y=True)
    assert sorted(rows) == sorted((label, *image.astype(int)) for image, label in zip(images, labels.tolist()))
    for arrays in data.values():  # shuffled: the classes are near balance everywhere
        share = np.bincount(arrays["label"], minlength=10) / len(arrays["label"])
        assert share.min() > 0.06 and share.max() < 0.15
    again = load_task("digits_mlp").data
    np.testing.assert_array_equal(again["train"]["image"], data["train"]["image"])


@pytest.mark.parametrize(
    ("data", "rows", "columns"), [("breast_cancer", 569, 30), ("wine", 178, 13), ("diabetes", 442, 10)]
)
def test_tables(data, rows, columns):
    task = load_task("tabular_mlp", data=data, hidden=16)
    counts = {split: len(arrays["target"]) for split, arrays in task.data.items()}
    assert sum(counts.values()) == rows and counts["test"] == rows // 5
    train = task.data["train"]
    assert train["row"].shape[1] == columns
    np.testing.assert_allclose(train["row"].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train["row"].std(0), 1, rtol=1e-4)
    params = task.init(jax.random.key(0))
    hidden = np.tanh(task.data["test"]["row"] @ params["layer_0"]["kernel"])
    outputs = hidden @ params["layer_1"]["kernel"]
    if data == "diabetes":
        expected = np.mean((outputs[:, 0] - task.data["test"]["target"]) ** 2)
        assert abs(train["target"].mean()) < 1e-5 and train["target"].std() == pytest.approx(1, rel=1e-4)
    else:
        chosen = np.take_along_axis(np.asarray(outputs), task.data["test"]["target"][:, None], 1)[:, 0]
        expected = np.mean(np.log(np.exp(outputs).sum(1)) - chosen)
    assert float(task.loss(params, task.data["test"])) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="choose one of breast_cancer, wine, diabetes"):
        load_task("tabular_mlp", data="iris")


def test_shift_against_loops():
    rng = np.random.default_rng(0)
    images = rng.random((9, 64), np.float32)
    down, right = np.repeat([-1, 0, 1], 3), np.tile([-1, 0, 1], 3)
    expected = np.zeros((9, 8, 8), np.float32)
    for n in range(9):
        for row in range(8):
            for column in range(8):
                if 0 <= row + down[n] < 8 and 0 <= column + right[n] < 8:
                    expected[n, row + down[n], column + right[n]] = images[n].reshape(8, 8)[row, column]
    shifted = jax.jit(shift)(jnp.asarray(images), jnp.asarray(down), jnp.asarray(right))
    np.testing.assert_array_equal(shifted, expected.reshape(9, 64))


def test_digits_augmentation():
    """Each image of a batch is a training image of the same label, shifted; all nine shifts come up alike."""
    task = load_task("digits_mlp", batch_size=900)
    train = task.data["train"]
    unshifted = load_task("digits_mlp", batch_size=900, augment=False)
    batch, plain = (jax.tree.map(np.asarray, jax.jit(t.sample)(jax.random.key(0), train)) for t in (task, unshifted))
    np.testing.assert_array_equal(batch["label"], plain["label"])
    known = {(label, image.tobytes()) for image, label in zip(train["image"], train["label"].tolist())}
    assert all((label, image.tobytes()) in known for image, label in zip(plain["image"], plain["label"].tolist()))

    padded = np.pad(plain["image"].reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    windows = [padded[:, i : i + 8, j : j + 8].reshape(-1, 64) for i in range(3) for j in range(3)]
    matches = np.stack([(window == batch["image"]).all(1) for window in windows])
    assert matches.any(0).all()
    counts = matches[:, matches.sum(0) == 1].sum(1)
    assert counts.min() > 60 and counts.max() < 145  # 100 expected, standard deviation 9.4


def test_linear_regression_inputs():
    inputs = np.asarray(linear_regression.draw(jax.random.key(3), 20_000), np.float64)
    first = inputs[:, 0] < inputs[:, 1]  # the side of (1, 2); the other centre is 3.5 deviations away
    assert abs(first.mean() - 0.5) < 0.02
    np.testing.assert_allclose(inputs[first].mean(0), (1, 2), atol=0.02)
    np.testing.assert_allclose(inputs[~first].mean(0), (2, 1), atol=0.02)
    np.testing.assert_allclose(inputs[first].std(0), linear_regression.STD, atol=0.01)


def test_linear_regression_loss():
    task = load_task("linear_regression")
    weights = np.array([[0.5], [-2.0]], np.float32)
    params = {"layer_0": {"kernel": jnp.asarray(weights)}}
    assert jax.tree.map(jnp.shape, task.init(jax.random.key(0))) == jax.tree.map(jnp.shape, params)
    test = task.data["test"]
    expected = np.mean([float(x @ weights[:, 0]) ** 2 for x in test["input"]])
    np.testing.assert_allclose(task.loss(params, test), expected, rtol=1e-5)
    assert task.loss(jax.tree.map(jnp.zeros_like, params), test) == 0
    np.testing.assert_array_equal(load_task("linear_regression").data["test"]["input"], test["input"])
    splits = [set(map(bytes, arrays["input"])) for arrays in task.data.values()]
    assert len(set.union(*splits)) == sum(map(len, splits))


@pytest.mark.parametrize("name", ["cifar1000_mlp", "mlp", "", "../tasks/digits_mlp", "tasks.digits_mlp"])
def test_unknown_task(name):
    with pytest.raises(ValueError, match=r"unknown task.*there are: .*digits_mlp") as error:
        load_task(name)
    assert "\n" not in str(error.value)


def test_unknown_setting():
    with pytest.raises(ValueError, match="'digits_mlp' has no setting width; it has: hidden"):
        load_task("digits_mlp", width=32)


@pytest.mark.parametrize("name", NAMES)
def test_refused_settings(name):
    settings = [{"batch_size": 0}, {"horizon": -5}]
    if name != "linear_regression":
        settings += [{"hidden": (0,)}, {"hidden": (8, -1)}]
    for setting in settings:
        with pytest.raises(ValueError, match="must be at least 1"):
            load_task(name, **setting)
    if name in IMAGE_TASKS:
        with pytest.raises(ValueError, match="unknown activation 'cube'; choose one of relu, tanh, gelu, silu"):
            load_task(name, activation="cube")


def test_a_task_is_added_as_one_file(tmp_path, monkeypatch):
    """A file that is dropped into the package's directory is found by its name."""
    source = Path(linear_regression.__file__).read_text()
    (tmp_path / "my_task.py").write_text(source.replace('"linear_regression"', '"my_task"'))
    (tmp_path / "misnamed.py").write_text(source)
    (tmp_path / "shared.py").write_text("def make_other(data_dir=None): ...\n")
    monkeypatch.setattr(gmn_lopt.tasks, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(gmn_lopt.tasks, "__path__", [str(tmp_path)])
    assert task_names() == ["misnamed", "my_task"]
    assert load_task("my_task", horizon=20).horizon == 20
    with pytest.raises(ValueError, match="named like its file"):
        load_task("misnamed")


def test_a_task_may_live_anywhere(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "bowls.py"
    file.write_text(Path(linear_regression.__file__).read_text() + "\n\ndef count():\n    return 3\n\n\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    task = load_task("elsewhere.bowls:make", batch_size=5)
    assert (task.name, task.batch_size) == ("linear_regression", 5)
    for spec, says in {
        "elsewhere.bowls:count": r"has no function count\(data_dir=None\)",
        "elsewhere.bowls:number": r"elsewhere\.bowls has no function number\(data_dir=None\)",
        "elsewhere.bowls:": r"has no function \(data_dir",
        "elsewhere.cups:make": "No module named 'elsewhere.cups'; what is not installed has to be on PYTHONPATH",
        ":make": "Empty module name",
        "..cups:make": "relative import",
    }.items():
        with pytest.raises(ValueError, match=says) as error:
            load_task(spec)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has no setting width; it has: batch_size, horizon"):
        load_task("elsewhere.bowls:make", width=3)


def test_there_is_one_copy_of_each_task():
    assert Path(gmn_lopt.tasks.__file__).parent == Path(__file__).parents[1] / "tasks"
    with pytest.raises(ImportError, match="beyond top-level package"):
        importlib.import_module("tasks")


def test_missing_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'gmn_lopt\[train\]'"):
        load_task("digits_mlp")
