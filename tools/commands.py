"""The command lines that a card gives, rebuilt from the settings of runs and reports."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gmn_lopt.cli.meta_train import to_command_line
from gmn_lopt.meta.config import SPREAD, Config
from gmn_lopt.util.spec import format_spec

# What says where a run was and what it was told about its machine, not what was trained.
OF_THE_MACHINE = ("out", "data_dir", "resume", *SPREAD)


def train_command(config: Config) -> str:
    """The command that trains with these settings; it names what is not as by default.

    Raises:
        ValueError: no recipe is made of the same parts.
    """
    return shlex.join(["gmn-meta-train", *to_command_line(replace(config, data_dir=None))])


def continue_command(config: Config, name: str) -> str:
    """The command that trains the shipped optimizer further, with the settings of the last stage."""
    return train_command(replace(config, start=name, stages=config.stages[-1:], out=Path(f"runs/{name}-continued")))


def eval_command(settings: Mapping[str, Any], optimizer: str, rounds: int) -> str:
    """The command that repeats an evaluation by the paper's protocol, which cards have.

    Args:
        settings: those of the report.
        optimizer: name of the shipped optimizer, with its settings if it has any.
        rounds: rounds in which the time per step was measured.
    """
    seeds, changed = settings["seeds"], settings.get("task_settings", {})
    task = format_spec(settings["task"], {k: tuple(v) if isinstance(v, list) else v for k, v in changed.items()})
    words = ["gmn-eval", "--task", task, "--optimizer", optimizer, "--protocol", "paper"]
    words += ["--seeds", str(len(seeds)), "--first-seed", str(seeds[0])]
    for key in ("horizon", "eval_every", "smoothing"):
        words += [f"--{key.replace('_', '-')}", str(settings[key])]
    place = f"{optimizer}-{task}".replace(":", "-")
    return shlex.join([*words, "--timing-rounds", str(rounds), "--out", f"report/{place}"])
