"""The command lines that a card gives, rebuilt from the settings of runs and reports."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gmn_lopt.meta.config import INITIAL_COEFFICIENTS, Config, to_json

# What says where a run was and what it was told about its machine, not what was trained.
OF_THE_MACHINE = ("out", "data_dir", "resume")


def train_command(settings: Mapping[str, Any], out: str) -> str:
    """The command that trains with these settings; it names the optimizer, and what is not as by default.

    Args:
        settings: those of a run's ``config.json``.
        out: the run directory that the command writes.
    """
    defaults = to_json(Config(task="", out=Path()))
    del defaults["optimizer"]
    chosen = {name: value for name, value in settings.items() if name not in OF_THE_MACHINE}
    chosen.pop("preset", None)
    # All flags are given relative to the paper's settings, whichever preset the run began from.
    return " ".join(["python meta_train.py --preset paper", *_flags(chosen, defaults), f"--out {shlex.quote(out)}"])


def continue_command(settings: Mapping[str, Any], name: str) -> str:
    """The command that trains the shipped optimizer further, with the settings of the last stage."""
    initial = dict.fromkeys(INITIAL_COEFFICIENTS)
    last = {"stages": settings["stages"].split(",")[-1].strip(), **initial}
    return train_command({**settings, **last, "start": name}, f"runs/{name}-continued")


def eval_command(settings: Mapping[str, Any], optimizer: str, rounds: int) -> str:
    """The command that repeats an evaluation.

    Args:
        settings: those of the report.
        optimizer: name of the shipped optimizer, with its settings if it has any.
        rounds: rounds in which the time per step was measured.
    """
    seeds = settings["seeds"]
    changed = settings.get("task_settings", {})
    words = ["python", "eval.py", "--task", settings["task"], "--optimizer", optimizer]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in changed.items()}
    texts = {k: v if isinstance(v, str) and v.isidentifier() else repr(v) for k, v in values.items()}
    for key, text in texts.items():
        words += ["--task-setting", f"{key}={text}"]
    words += ["--seeds", str(len(seeds)), "--first-seed", str(seeds[0])]
    for key in ("horizon", "eval_every", "smoothing"):
        words += [f"--{key.replace('_', '-')}", str(settings[key])]
    words += ["--timing-rounds", str(rounds)]
    place = "-".join([optimizer.partition(":")[0], settings["task"], *(f"{key}-{text}" for key, text in texts.items())])
    return shlex.join([*words, "--out", f"report/{place}"])


def _flags(settings: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    for name, value in settings.items():
        default = defaults.get(name)
        flag = name.replace("_", "-")
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            yield from _flags(value, default, f"{prefix}{flag}.")
        elif value == default:
            continue
        elif isinstance(value, bool):
            yield f"{prefix}{'' if value else 'no-'}{flag}"
        else:
            yield f"{prefix}{flag} {shlex.quote(str(value))}"
