"""Put a trained optimizer into the package, with a card that says how it was trained and what it was measured to do.

python -m tools.ship --run runs/c10 --report report/c10/report.json --name cifar10_mlp-ds+gmn
--description "DS+GradMetaNet, meta-trained on CIFAR-10 (8x8 pixels, width 32)"

The reports must have measured the meta-parameters that the run has now. Shipping again under the same name replaces
what was there, so give all reports each time. The tables of docs/pretrained.md are written anew.
"""

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from gmn_lopt import LearnedOptimizer
from gmn_lopt.cli.command_line import parse
from gmn_lopt.meta.run_directory import RunError
from gmn_lopt.optimizers.saved import CONFIG_FILE, SHIPPED, WEIGHTS_FILE, digest, load_learned
from gmn_lopt.optimizers.shipped import CARD_FILE
from gmn_lopt.util.errors import FileError, first_line
from gmn_lopt.util.files import read_json
from tools import tables
from tools.cards import FORMAT, VERSION, count, directory_problems, readable, rounded, some_structure
from tools.facts import ShipError, measured, training_facts

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    """What to ship."""

    run: Path
    """Run directory of gmn-meta-train, whose current optimizer is shipped; or, with --training, a saved optimizer."""
    name: str
    """Name to ship it under, such as cifar10_mlp-ds+gmn."""
    description: str
    """One line on what it is."""
    report: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]
    """A report.json of gmn-eval --protocol paper; repeat the flag for several."""
    hardware: str | None = None
    """What it was trained on, in words; default: what the run says, else this machine."""
    training: Path | None = None
    """JSON file with the card's entry "training", for an optimizer that gmn-meta-train did not train."""


def main(config: Config, root: Path = ROOT) -> Path:
    """Ship an optimizer and write the tables anew.

    Args:
        config: what to ship.
        root: the checkout to ship it in.

    Returns:
        The directory that holds the shipped optimizer.

    Raises:
        ValueError, RunError: in one line, what keeps it from being shipped. Nothing is changed then.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", config.name):
        raise ShipError(f"--name {config.name!r}: use letters, digits and _ . + - only")
    tables.generated(root)  # fails before anything is changed, if it fails
    source = config.run / "optimizer" if (config.run / "optimizer").is_dir() else config.run
    lopt, phi = load_learned(source, some_structure(source))
    card = {
        "format": FORMAT,
        "version": VERSION,
        "name": config.name,
        "description": config.description,
        "licence": "Apache-2.0",
        "weights": {"digest": digest(phi), "count": count(phi)},
        "architecture": architecture(lopt),
        "training": _training(config),
        "evaluations": [measured(file, config.name, digest(phi)) for file in config.report],
    }
    target = root / "gmn_lopt" / SHIPPED / config.name
    new = target.with_name(f".{config.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(source / file, new / file)
        (new / CARD_FILE).write_text(readable(rounded(card)), encoding="utf-8")
        if problems := directory_problems(new):
            more = f" (and {len(problems) - 1} more)" * (len(problems) > 1)
            raise ShipError(f"cannot ship {config.name}: {problems[0].partition(': ')[2]}{more}")
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    tables.write(root)
    return target


def architecture(lopt: LearnedOptimizer) -> dict[str, Any]:
    """The parts of an optimizer by name."""
    residual = lopt.residual
    return {
        "direction": type(lopt.direction).__name__,
        "features": type(residual.features).__name__ if residual else None,
        "network": type(residual.network).__name__ if residual else None,
        "gradmetanet": residual is not None and residual.gradmetanet is not None,
        "rule": type(lopt.rule).__name__,
        "step_size": type(lopt.step_size).__name__,
    }


def _training(config: Config) -> Any:
    if config.training is None:
        if not (config.run / "metrics.jsonl").is_file():
            raise ShipError(f"--run {config.run} is no run of gmn-meta-train: say with --training how it was trained")
        return training_facts(config.run, config.name, config.hardware)
    try:
        return read_json(config.training)
    except FileError as error:
        raise ShipError(f"--training {error}") from None


def cli(args: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    config = parse(Config, __doc__, args)
    try:
        target = main(config)
    except (ValueError, RunError, OSError) as error:
        print(f"ship.py: {first_line(error)}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"shipped {config.name} in {target.relative_to(ROOT)}, {size / 1000:.0f} kB; commit it with the tables")
    return 0


if __name__ == "__main__":
    sys.exit(cli())
