"""The command lines that a card gives, rebuilt from the settings of runs and reports."""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gmn_lopt.meta.config import SPREAD, Config
from gmn_lopt.meta.presets import PAPER
from gmn_lopt.meta.stages import Stage
from gmn_lopt.optimizers.recipes import RECIPES, Recipe
from gmn_lopt.util.codec import to_json

# What says where a run was and what it was told about its machine, not what was trained.
OF_THE_MACHINE = ("out", "data_dir", "resume", *SPREAD)


def train_command(config: Config) -> str:
    """The command that trains with these settings, whichever preset they began from: all flags are relative to one.

    Raises:
        ValueError: no recipe is made of the same parts.
    """
    words = ["gmn-meta-train", "--preset", "paper", "--task", config.task]
    if config.start is None:
        words += _optimizer_flags(config.optimizer)
    for stage in config.stages:
        words += ["--stage", stage_spec(stage)]
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if field.name not in ("task", "optimizer", "stages", *OF_THE_MACHINE) and value != getattr(PAPER, field.name):
            words += [_flag(field.name), str(value)]
    return shlex.join([*words, "--out", str(config.out)])


def continue_command(config: Config, name: str) -> str:
    """The command that trains the shipped optimizer further, with the settings of the last stage."""
    return train_command(replace(config, start=name, stages=config.stages[-1:], out=Path(f"runs/{name}-continued")))


def stage_spec(stage: Stage) -> str:
    """A stage as ``--stage`` takes it, with what is not as by default."""
    changed = {f.name: getattr(stage, f.name) for f in dataclasses.fields(Stage)[1:]}
    return spec(stage.estimator, {key: value for key, value in changed.items() if value != getattr(Stage(), key)})


def spec(name: str, settings: Mapping[str, Any]) -> str:
    """``NAME:setting=value,setting=value``, see :mod:`gmn_lopt.util.spec`."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    texts = {k: v if isinstance(v, str) and v.isidentifier() else repr(v) for k, v in values.items()}
    return name + ":" * bool(texts) + ",".join(f"{key}={text}" for key, text in texts.items())


def eval_command(settings: Mapping[str, Any], optimizer: str, rounds: int) -> str:
    """The command that repeats an evaluation.

    Args:
        settings: those of the report.
        optimizer: name of the shipped optimizer, with its settings if it has any.
        rounds: rounds in which the time per step was measured.
    """
    seeds, changed = settings["seeds"], settings.get("task_settings", {})
    task = spec(settings["task"], changed)
    words = ["gmn-eval", "--task", task, "--optimizer", optimizer]
    words += ["--seeds", str(len(seeds)), "--first-seed", str(seeds[0])]
    for key in ("horizon", "eval_every", "smoothing"):
        words += [_flag(key), str(settings[key])]
    place = "-".join([optimizer, task]).replace(":", "-")
    return shlex.join([*words, "--timing-rounds", str(rounds), "--out", f"report/{place}"])


def _optimizer_flags(recipe: Recipe) -> list[str]:
    """``--optimizer NAME`` and the flags that change single fields of it: of the nearest of all recipes."""
    found = []
    for name, base in RECIPES.items():
        try:
            flags = [word for pair in _changes(to_json(recipe), to_json(base), "--optimizer") for word in pair]
        except ValueError:  # of other parts
            continue
        found.append(["--optimizer", name, *flags])
    if not found:
        raise ValueError("no recipe of gmn_lopt.optimizers.recipes is made of the same parts as this optimizer")
    return min(found, key=len)


def _changes(value: Any, base: Any, flag: str) -> Iterator[list[str]]:
    if isinstance(value, dict) or isinstance(base, dict):
        if not isinstance(value, dict) or not isinstance(base, dict) or value["name"] != base["name"]:
            raise ValueError
        for key in value:
            yield from _changes(value[key], base[key], f"{flag}.{_flag(key)[2:]}")
    elif value != base:
        yield [flag, *(map(str, value) if isinstance(value, list) else [str(value)])]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
