"""The experiment on implicit neural representations: its edits, its data, its training, and what it refuses."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import edit_inr
from experiments.inr_editing import __main__ as command
from experiments.inr_editing import data, edits, report, siren, train
from gmn_lopt.networks.saved_editor import load_editor
from gmn_lopt.tasks.data.cache import DataError
from gmn_lopt.util.errors import UsageError


def images(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


def test_dilation_is_the_maximum_over_neighbours():
    image = images(2, 5, 7, 3) - 2.0  # negative values would lose against a border of zeros
    found = edits.dilate(image)
    for n, i, j, c in np.ndindex(image.shape):
        neighbours = image[n, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2, c]
        assert found[n, i, j, c] == neighbours.max()


def literal_clahe(image, clip, tiles):
    """Pixel by pixel and count by count."""
    height, width = image.shape
    mirrored = lambda i, n: i if i < n else 2 * (n - 1) - i  # noqa: E731
    rows, columns = -(-height // tiles), -(-width // tiles)
    limit = max(int(clip * rows * columns / 256), 1)
    maps = {}
    for a in range(tiles):
        for b in range(tiles):
            counts = [0] * 256
            for i in range(a * rows, (a + 1) * rows):
                for j in range(b * columns, (b + 1) * columns):
                    counts[image[mirrored(i, height), mirrored(j, width)]] += 1
            excess = sum(max(count - limit, 0) for count in counts)
            counts = [min(count, limit) + excess // 256 for count in counts]
            rest, level = excess % 256, 0
            step = max(256 // rest, 1) if rest else 256
            while rest > 0 and level < 256:
                counts[level] += 1
                rest, level = rest - 1, level + step
            total = 0
            for level in range(256):
                total += counts[level]
                maps[a, b, level] = min(round(total * 255 / (rows * columns)), 255)
    found = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            y, x = i / rows - 0.5, j / columns - 0.5
            value = 0.0
            for a, share in ((int(np.floor(y)), 1 - y % 1), (int(np.floor(y)) + 1, y % 1)):
                for b, part in ((int(np.floor(x)), 1 - x % 1), (int(np.floor(x)) + 1, x % 1)):
                    place = min(max(a, 0), tiles - 1), min(max(b, 0), tiles - 1)
                    value += share * part * maps[(*place, image[i, j])]
            found[i, j] = round(value)
    return found


@pytest.mark.parametrize(("clip", "tiles"), [(1.0, 3), (4.0, 2), (40.0, 1)])
def test_clahe_is_what_it_says(clip, tiles):
    image = (images(14, 11) ** 2 * 255).astype(np.uint8)
    expected = literal_clahe(image, clip, tiles).astype(int)
    # Halves are rounded after sums in another precision.
    assert np.abs(edits.clahe(image, clip, tiles).astype(int) - expected).max() <= 1
    assert np.mean(edits.clahe(image, clip, tiles) == expected) > 0.97


def test_clahe_is_opencvs():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    image = (images(32, 32) ** 2 * 255).astype(np.uint8)
    expected = cv2.createCLAHE(clipLimit=1.0, tileGridSize=(3, 3)).apply(image)
    assert np.abs(edits.clahe(image, 1.0, 3).astype(int) - expected).max() <= 1


def test_one_tile_without_limit_is_histogram_equalisation():
    image = (images(16, 16) ** 3 * 255).astype(np.uint8)
    expected = np.array([np.rint((image <= level).sum() * 255 / image.size) for level in range(256)])[image]
    np.testing.assert_array_equal(edits.clahe(image, 1e9, 1), expected)


def test_colours_and_lightness():
    # The CIE's own values of sRGB's red, green and blue, and of a middle grey.
    known = {(1, 0, 0): (53.24, 80.09, 67.20), (0, 1, 0): (87.73, -86.18, 83.18), (0, 0, 1): (32.30, 79.19, -107.86)}
    known[0.5, 0.5, 0.5] = (53.39, 0.0, 0.0)
    for rgb, lab in known.items():
        np.testing.assert_allclose(edits.rgb_to_lab(np.array(rgb, float)), lab, atol=0.05)
    colours = images(50, 3)
    np.testing.assert_allclose(edits.lab_to_rgb(edits.rgb_to_lab(colours)), colours, atol=1e-6)


def test_contrast_changes_lightness_only():
    image = 0.4 + 0.2 * images(2, 32, 32, 3)
    before, after = edits.rgb_to_lab(image), edits.rgb_to_lab(edits.contrast(image))
    inside = (edits.contrast(image) > 0).all(-1) & (edits.contrast(image) < 1).all(-1)
    np.testing.assert_allclose(after[inside][:, 1:], before[inside][:, 1:], atol=1e-6)
    assert after[..., 0].std() > 1.5 * before[..., 0].std()


def test_a_siren_is_its_formula():
    params = siren.init(jax.random.key(0), 3)
    points = siren.grid(4, 5)
    assert points.shape == (20, 2) and points[1].tolist() == [-1.0, -0.5] and points[-1].tolist() == [1.0, 1.0]
    hidden = np.sin(30 * (np.asarray(points) @ params["w0"] + params["b0"]))
    hidden = np.sin(30 * (hidden @ params["w1"] + params["b1"]))
    np.testing.assert_allclose(siren.forward(params, points)[-1], hidden @ params["w2"] + params["b2"], atol=1e-3)


SMALL = replace(command.QUICK, train=24, valid=8, test=8, steps=12, batch=4, pixels=16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GMN_LOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def splits(cache):
    return data.load("digits", SMALL.counts, quiet=True)


def test_networks_show_their_images(splits):
    assert {name: len(split) for name, split in splits.items()} == SMALL.counts
    for split in splits.values():
        assert data.psnr("digits", split) > 30.0
    pixels = np.asarray(splits["train"].original)
    assert pixels.min() == -0.5 and pixels.max() == 0.5
    expected = edits.dilate(pixels.reshape(-1, 16, 16, 1)).reshape(pixels.shape)
    np.testing.assert_allclose(splits["train"].target, expected, atol=1e-6)
    starts = splits["train"].params["w0"]
    assert jnp.abs(starts[0] - starts[1]).max() > 0.1, "networks started from the same weights"


def test_networks_are_kept_and_do_not_depend_on_how_many_are_wanted(splits, monkeypatch):
    monkeypatch.setattr(data, "_fit_one", lambda *args: pytest.fail("fitted again"))
    again = data.load("digits", SMALL.counts, quiet=True)
    assert (again["test"].params["w1"] == splits["test"].params["w1"]).all()
    monkeypatch.undo()
    fewer = data.load("digits", {"train": 3, "valid": 2, "test": 1}, quiet=True)
    for key, start, n in (("train", 0, 3), ("valid", 3, 2)):
        np.testing.assert_allclose(fewer[key].params["w1"], splits["train"].params["w1"][start : start + n], atol=1e-4)


def test_known_values_are_those_of_the_points(splits):
    editor = train.make_editor(SMALL, "gmn", "gradmetanet", splits["train"].params)
    kind = data.IMAGES["digits"]
    known = train.known_values(editor, kind, jnp.arange(256.0).reshape(1, 256, 1))[0, :, 0]
    expected = [np.abs(np.asarray(siren.grid(16, 16)) - point).sum(1).argmin() for point in editor.points]
    assert known.tolist() == expected and len(set(expected)) == SMALL.points
    assert editor.points == train.make_editor(SMALL, "dws", "told", splits["test"].params).points


@pytest.fixture(scope="module")
def trained(splits, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    return out, train.train(SMALL, "gmn", "gradmetanet", 0, splits, out, quiet=True)


def test_training_lowers_the_error_that_the_saved_editor_has(splits, trained):
    out, result = trained
    test = splits["test"]
    loaded = load_editor(out / "editor", siren.forward, train.first(test.params))
    kind = data.IMAGES["digits"]
    known = train.known_values(loaded.module.config, kind, test.target)
    found = []
    for i in range(len(test)):
        edited = loaded(jax.tree.map(lambda x, i=i: x[i], test.params), known[i])
        values = np.mean([siren.forward(p, siren.grid(16, 16))[-1] for p in unstacked(edited)], 0)
        found.append(((values - test.target[i]) ** 2).mean())
    assert np.mean(found) == pytest.approx(result["errors"]["test"], rel=1e-3)
    assert result["errors"]["test"] < float(((test.original - test.target) ** 2).mean())
    assert result["weights"] == sum(x.size for x in jax.tree.leaves(loaded.weights))


def unstacked(params):
    return [jax.tree.map(lambda x, i=i: x[i], params) for i in range(len(params["b0"]))]


def test_the_example_edits_a_network_with_it(trained, monkeypatch, capsys):
    monkeypatch.setattr(edit_inr, "EDITOR", trained[0] / "editor")
    error = edit_inr.main(steps=200)
    before, after = map(float, re.findall(r"0\.\d+", capsys.readouterr().out))
    assert after < before and f"{error:.3f}" == f"{after:.3f}"


def test_an_interrupted_run_goes_on_bit_for_bit(splits, trained, tmp_path, monkeypatch):
    _, expected = trained
    count = 0

    def interrupt(*args, real=train._write_checkpoint):
        nonlocal count
        real(*args)
        count += 1
        if count == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_write_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.train(SMALL, "gmn", "gradmetanet", 0, splits, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "result.json").exists()
    steps = []
    monkeypatch.setattr(train, "_write_checkpoint", lambda *args: steps.append(args[3]))
    again = train.train(SMALL, "gmn", "gradmetanet", 0, splits, tmp_path / "run", quiet=True)
    assert steps[0] == 8
    assert again["errors"] == expected["errors"]
    weights = [(out / "editor" / "weights.safetensors").read_bytes() for out in (trained[0], tmp_path / "run")]
    assert weights[0] == weights[1]


def test_a_run_of_other_settings_or_damaged_is_refused_in_one_line(splits, trained, tmp_path, monkeypatch):
    out, _ = trained
    with pytest.raises(UsageError, match="was trained with other settings: choose another --out"):
        train.train(replace(SMALL, steps=13), "gmn", "gradmetanet", 0, splits, out, quiet=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.npz").write_bytes(b"PK damaged")
    with pytest.raises(UsageError, match="is damaged: remove it"):
        train.train(SMALL, "gmn", "weights", 0, splits, tmp_path / "run", quiet=True)


def test_the_report_has_every_method_and_its_gain(splits, trained, tmp_path):
    out, result = trained
    base = json.loads(json.dumps(result))
    base["setting"]["method"] = "weights"
    base["errors"]["test"] = 2 * result["errors"]["test"]
    runs = [{**run, "run": out} for run in (base, result)]
    table = report.write(tmp_path, SMALL, splits, runs)
    assert (tmp_path / "report.md").read_text() == table + "\n"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[4:]]
    assert [row[:2] for row in rows] == [["none", ""], ["gmn", "its weights"], ["gmn", "+ GradMetaNet"]]
    assert [row[3] for row in rows] == ["", "", "50.0%"]
    assert (tmp_path / "edits.png").stat().st_size > 5000


def one_line(text):
    return text.count("\n") == 1 and "Traceback" not in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "magic"], "--methods does not take 'magic': choose of weights, "),
        (["--seeds", "0"], "--seeds and --steps must be at least 1"),
        (["--setting", "mnist"], "--setting"),
        (["--setting", "fashion_mnist", "--data-dir", "nowhere"], "data set 'fashion_mnist' has no usable cache"),
    ],
)
def test_wrong_input_ends_in_one_line(cache, tmp_path, flags, words, capsys):
    try:
        code = command.cli(["--out", str(tmp_path), *flags])
    except SystemExit as exit_:
        code = exit_.code
    printed = capsys.readouterr().err
    assert code == 2 and words in printed and one_line(printed)


def test_images_of_another_size_are_refused_in_one_line(monkeypatch):
    with pytest.raises(UsageError, match=r"images of \(7, 16, 1\) pixels, expected \(16, 16, 1\)"):
        data.fit("digits", "train", np.zeros((1, 7, 16, 1), np.float32), quiet=True)
    with pytest.raises(UsageError, match="digits has 1437 images in its train split, fewer than 2001"):
        data.load("digits", {"train": 2000, "valid": 1, "test": 1}, quiet=True)
    with pytest.raises(UsageError, match="unknown data set 'mnist'"):
        data.load("mnist", SMALL.counts)


def test_a_missing_data_set_says_how_to_bring_it(cache, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(DataError, match="To bring it: pip install") as error:
        data.load("cifar10", SMALL.counts, str(tmp_path))
    assert "\n" not in str(error.value)
