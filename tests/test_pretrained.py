"""Shipping an optimizer: its card, the tables, the commands; and every optimizer that is shipped."""

import configparser
import json
import shlex
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import gmn_lopt
from gmn_lopt.cli import eval as evaluation
from gmn_lopt.cli import meta_train
from gmn_lopt.cli.command_line import parse
from gmn_lopt.evaluation import plots
from gmn_lopt.meta import config as training_config
from gmn_lopt.meta.stages import Stage
from gmn_lopt.meta.task import task_structure
from gmn_lopt.optimizers.saved import SerializationError, load_learned, save, shipped_names
from gmn_lopt.tasks import load_task
from tools import cards, commands, ship, tables
from tools.facts import ShipError, training_seconds

ROOT = Path(ship.__file__).parent.parent
NAME = "digits_mlp-sgdm"
SGDM = gmn_lopt.Recipe(step_size=gmn_lopt.Constant(2.0))
RUN = training_config.Config(
    task="digits_mlp",
    out=Path("runs/any"),
    optimizer=SGDM,
    stages=(
        Stage("truncated", meta_steps=4, learning_rate=1e-3, truncation=5, pairs=2),
        Stage("pes", meta_steps=2, truncation=5, pairs=3),
    ),
    horizon=10,
    log_every=2,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run and its evaluation."""
    place = tmp_path_factory.mktemp("trained")
    run, report = place / "run", place / "report"
    assert meta_train.main(replace(RUN, out=run)) is True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_curves", lambda *_: Figure())
        evaluation.main(
            evaluation.Config(
                task="digits_mlp:hidden=8",
                out=report,
                optimizer=(f"mine={run}", "optax:sgd:learning_rate=0.1"),
                seeds=2,
                horizon=6,
                protocol="paper",
                trials_at_once=20,
                timing_rounds=2,
            )
        )
    return run, report / "report.json"


@pytest.fixture
def root(tmp_path):
    """What of a checkout an optimizer is shipped in, without any that are shipped."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/pretrained.md", tmp_path / "docs")
    tables.write(tmp_path)
    return tmp_path


def use_package(monkeypatch, place):
    """Let the package's own files be those of another place."""
    files = resources.files
    monkeypatch.setattr(resources, "files", lambda package: place if package == "gmn_lopt" else files(package))


def config(trained, **changes) -> ship.Config:
    run, report = trained
    return replace(ship.Config(run, NAME, "SGDM on digits", (report,)), **changes)


def test_shipping(trained, root, monkeypatch):
    assert tables.NONE_YET in (root / "docs/pretrained.md").read_text()
    target = ship.main(config(trained), root)
    assert target == root / "gmn_lopt" / "pretrained" / NAME
    assert cards.directory_problems(target) == []
    assert (target / "phi.safetensors").read_bytes() == (trained[0] / "optimizer/phi.safetensors").read_bytes()

    use_package(monkeypatch, root / "gmn_lopt")
    assert gmn_lopt.list_pretrained() == {NAME: "SGDM on digits"}
    card = gmn_lopt.card(NAME)
    training = card["training"]
    assert training["tasks"] == ["digits_mlp"]
    assert training["meta_steps"] == 6
    assert training["inner_steps"] == 4 * 2 * 5 + 2 * (2 * 3) * 5
    assert training["seeds"] == [0]
    assert training["recipe"]["optimizer"]["step_size"]["initial"] == 2.0 and "out" not in training["recipe"]
    assert training["seconds"] > 0
    assert training["hardware"] and "hardware" not in training["versions"]
    (entry,) = card["evaluations"]
    (row,) = entry["optimizers"]
    report = json.loads(trained[1].read_text())
    assert row["name"] == "mine" and row["source"] == NAME
    assert row["best_test_loss"] == cards.rounded(report["optimizers"][1]["best_test_loss"])
    assert entry["adam"]["seeds"] == cards.rounded(report["optimizers"][0]["seeds"])
    assert entry["baseline"] == cards.rounded(report["baseline"])
    params = {"w": np.ones((3, 2), np.float32)}
    loss = lambda p: (p["w"] ** 2).mean()  # noqa: E731
    tx = gmn_lopt.load(NAME, gmn_lopt.analyze(loss, params))
    assert np.isfinite(tx.update(params, tx.init(params), params)[0]["w"]).all()

    # The commands make the same settings, and the same evaluation.
    words = shlex.split(training["commands"]["train"])
    assert words[:3] == ["gmn-meta-train", "--task", "digits_mlp"]
    assert meta_train.from_command_line(None, words[1:]) == replace(RUN, out=Path(f"runs/{NAME}"))
    on = meta_train.from_command_line(None, shlex.split(training["commands"]["continue"])[1:])
    assert on == replace(RUN, stages=RUN.stages[1:], start=NAME, out=Path(f"runs/{NAME}-continued"))
    found = parse(evaluation.Config, None, shlex.split(row["command"])[1:])
    assert (found.task, found.optimizer) == ("digits_mlp:hidden=8", (NAME,))
    assert (found.seeds, found.horizon, found.eval_every, found.timing_rounds) == (2, 6, 1, 2)

    # The tables.
    assert tables.outdated(root) == []
    text = (root / "docs/pretrained.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{NAME}`")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1] == "digits_mlp (hidden=8)"
    assert cells[3] == f"{row['misses']} of 2"
    assert cells[4].startswith(f"{row['best_test_loss']['mean']:.4f} ± ")
    assert cells[5].startswith(f"{entry['adam']['best_test_loss']['mean']:.4f} ± ")
    assert tables.NONE_YET not in text
    whole = text.replace(" \\\n    ", " ")
    assert all(command in whole for command in (row["command"], *training["commands"].values()))

    # A card that has changed makes them out of date; shipping again replaces everything.
    (target / "card.json").write_text((target / "card.json").read_text().replace("SGDM on digits", "SGDM on letters"))
    assert tables.outdated(root) == [root / "docs/pretrained.md"]
    ship.main(config(trained, description="anew"), root)
    assert gmn_lopt.list_pretrained() == {NAME: "anew"}
    assert [path.name for path in target.parent.iterdir()] == [NAME]


def load(path):
    return load_learned(path, cards.some_structure(path))


@pytest.mark.parametrize("name", ["unf", "unf+gmn"])
def test_an_optimizer_that_belongs_to_one_model_can_be_shipped(name, tmp_path):
    lopt = gmn_lopt.recipe(name, task_structure(load_task("digits_mlp")))
    phi = lopt.init(jax.random.key(0))
    save(tmp_path / "unf", lopt, phi)
    loaded, found = load(tmp_path / "unf")
    assert replace(loaded, structure=lopt.structure) == lopt
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, phi))


def test_weights_that_the_report_did_not_measure_are_refused(trained, root, tmp_path):
    lopt, phi = load(trained[0] / "optimizer")
    run = tmp_path / "further"
    shutil.copytree(trained[0], run)
    save(run / "optimizer", lopt, jax.tree.map(lambda x: x + 1e-3, phi))
    with pytest.raises(ShipError, match=r"did not measure these.*mine from"):
        ship.main(config(trained, run=run), root)
    assert not list(root.glob("gmn_lopt/pretrained/*"))


def test_the_settings_of_a_row_are_kept(trained, root, tmp_path):
    report = json.loads(trained[1].read_text())
    report["optimizers"][1]["source"] = "elsewhere:learning_rate=0.1"
    (tmp_path / "other.json").write_text(json.dumps(report))
    target = ship.main(config(trained, report=(tmp_path / "other.json",)), root)
    (row,) = json.loads((target / "card.json").read_text())["evaluations"][0]["optimizers"]
    assert row["source"] == f"{NAME}:learning_rate=0.1"
    assert f"--optimizer {NAME}:learning_rate=0.1 " in row["command"]


def test_a_saved_optimizer_needs_to_be_told_its_training(trained, root, tmp_path):
    saved = trained[0] / "optimizer"
    with pytest.raises(ShipError, match="--training"):
        ship.main(config(trained, run=saved), root)
    training = tmp_path / "training.json"
    training.write_text('{"tasks": ["digits_mlp"]}')
    with pytest.raises(ShipError, match=r"training\.commands is missing.*and 7 more"):
        ship.main(config(trained, run=saved, training=training), root)
    card = json.loads((ship.main(config(trained), root) / "card.json").read_text())
    training.write_text(json.dumps(card["training"] | {"hardware": "one abacus"}))
    target = ship.main(config(trained, run=saved, training=training), root)
    assert json.loads((target / "card.json").read_text())["training"]["hardware"] == "one abacus"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "../away"}, "letters, digits"),
        ({"name": ""}, "letters, digits"),
        ({"description": ""}, "description is missing"),
        ({"description": "two\nlines"}, "more than one line"),
        ({"description": "see /home/me/runs"}, "place on one machine"),
        ({"report": ()}, "evaluations.* is missing"),
        ({"report": (Path("no.json"),)}, "no.json is not a report"),
        ({"report": (ROOT / "setup.cfg",)}, "setup.cfg is not a report"),
        ({"run": Path("no-run")}, "no-run"),
    ],
)
def test_what_cannot_be_shipped_is_refused_and_changes_nothing(trained, root, changes, says):
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises((ShipError, SerializationError)) as error:
        ship.main(config(trained, **changes), root)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_report_by_the_fair_protocol_is_not_for_a_card(trained, root, tmp_path):
    report = json.loads(trained[1].read_text())
    report["settings"]["protocol"] = "fair"
    (tmp_path / "fair.json").write_text(json.dumps(report))
    with pytest.raises(ShipError, match="gmn-eval --protocol paper: it is by the fair protocol"):
        ship.main(config(trained, report=(tmp_path / "fair.json",)), root)


def test_the_time_is_that_of_the_speeds():
    rows = [
        {"meta_step": 2, "stage": "1-truncated", "inner_steps_per_second": None},
        {"meta_step": 4, "stage": "1-truncated", "inner_steps_per_second": 10.0},
        {"meta_step": 10, "stage": "1-truncated", "inner_steps_per_second": 40.0},
        {"meta_step": 11, "stage": "2-pes", "inner_steps_per_second": 5.0},
    ]
    assert training_seconds(rows, [100, 50]) == pytest.approx(2 * 100 / 25 + 2 * 100 / 10 + 6 * 100 / 40 + 50 / 5)
    assert training_seconds(rows[:1], [100, 50]) is None
    assert training_seconds([], [100]) is None


def test_eval_commands_name_every_kind_of_setting():
    settings = {
        "task": "cifar10_mlp",
        "seeds": [3, 4],
        "horizon": 200,
        "eval_every": 2,
        "smoothing": 5,
        "task_settings": {"hidden": [64, 32], "augment": False, "name": "a b", "data": "wine"},
    }
    words = shlex.split(commands.eval_command(settings, "n:learning_rate=0.1", 3))
    found = parse(evaluation.Config, None, words[1:])
    assert evaluation.parse_task("--task", found.task) == (
        "cifar10_mlp",
        settings["task_settings"] | {"hidden": (64, 32)},
    )
    assert found.optimizer == ("n:learning_rate=0.1",)
    assert (found.first_seed, found.seeds, found.smoothing, found.eval_every) == (3, 2, 5, 2)
    assert ":" not in str(found.out)


def test_cards_are_readable():
    value = {"text": "a [\n1,\n2\n] b", "many": [1.0, None, -2.5e-7], "nested": [[1, 2], []], "objects": [{"a": 1}]}
    text = cards.readable(value)
    assert json.loads(text) == value
    assert ' "many": [1.0, null, -2.5e-07]' in text and "[1, 2]" in text
    assert cards.rounded({"a": (1 / 3, float("inf"), 7)}) == {"a": [0.33333, None, 7]}


def test_unknown_and_damaged_cards_end_in_one_line(tmp_path, monkeypatch):
    use_package(monkeypatch, tmp_path)
    with pytest.raises(SerializationError, match="there are: none yet"):
        gmn_lopt.card("default")
    (tmp_path / "pretrained" / "default").mkdir(parents=True)
    (tmp_path / "pretrained" / ".half.new").mkdir()
    for content in (None, "{", "[]"):
        if content is not None:
            (tmp_path / "pretrained" / "default" / "card.json").write_text(content)
        with pytest.raises(SerializationError, match=r"card.json is (missing|damaged)") as error:
            gmn_lopt.list_pretrained()
        assert "\n" not in str(error.value)


def test_the_tables_are_up_to_date():
    assert tables.outdated(ROOT) == [], "run python -m tools.tables"


def test_a_file_without_markers_is_named(trained, root):
    (root / "docs/pretrained.md").write_text("nothing")
    for attempt in (tables.write, lambda root: ship.main(config(trained), root)):
        with pytest.raises(tables.TableError, match=r"docs/pretrained\.md lacks"):
            attempt(root)
    assert not (root / "gmn_lopt").exists()


def test_the_check_says_what_is_out_of_date(trained, root, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", root)
    assert tables.cli(["--check"]) == 0
    ship.main(config(trained), root)
    written = (root / "docs/pretrained.md").read_text()
    (root / "docs/pretrained.md").write_text(written.replace(" of 2 |", " of 3 |"))
    assert tables.cli(["--check"]) == 1
    assert "not up to date with the cards: docs/pretrained.md;" in capsys.readouterr().err
    assert tables.cli([]) == tables.cli(["--check"]) == 0
    assert (root / "docs/pretrained.md").read_text() == written


def test_shipped_files_are_package_data():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    patterns = config["options.package_data"]["gmn_lopt"].split()
    for file in ("some-name/config.json", "some+name/phi.safetensors", "n/card.json"):
        assert any(fnmatch(f"pretrained/{file}", pattern) for pattern in patterns)


def train(tx_of, steps=200):
    """Training losses of a small network on digits."""
    task = load_task("digits_mlp", hidden=16, batch_size=32)
    params, batch = task.init(jax.random.key(0)), task.sample(jax.random.key(0), task.data["train"])
    tx = tx_of(gmn_lopt.analyze(task.loss, params, batch))

    @jax.jit
    def run(params):
        def step(carry, t):
            params, state = carry
            batch = task.sample(jax.random.fold_in(jax.random.key(1), t), task.data["train"])
            value, grads, factors = gmn_lopt.value_grad_and_factors(task.loss)(params, batch)
            updates, state = tx.update(grads, state, params, factors=factors)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), np.arange(steps))[1]

    return np.asarray(run(params))


def trains(losses):
    return bool(np.isfinite(losses).all() and losses[-10:].mean() < 0.9 * losses[0])


def test_a_diverging_optimizer_is_told_from_one_that_trains():
    def sgdm(alpha):
        def tx_of(structure):
            lopt = replace(SGDM, step_size=gmn_lopt.Constant(alpha)).build(structure)
            return lopt.optimizer(lopt.init(jax.random.key(0)))

        return tx_of

    assert trains(train(sgdm(1.0)))
    assert not trains(train(sgdm(1e4)))
    assert not trains(train(sgdm(1e-6)))


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_optimizers(name):
    directory = ROOT / "gmn_lopt" / "pretrained" / name
    assert cards.directory_problems(directory) == []
    assert gmn_lopt.card(name)["name"] == name
    assert trains(train(lambda structure: gmn_lopt.load(name, structure)))
