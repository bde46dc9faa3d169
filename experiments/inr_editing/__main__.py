"""Train editors of implicit neural representations and report what they come to: ``--help`` lists all flags.

python -m experiments.inr_editing --out runs/inr_editing

makes the quick setting (digits). Interrupt it at any time: the same command goes on where it stopped.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from experiments.inr_editing import data, report
from experiments.inr_editing.train import METHODS, NETWORKS, Setting, train
from gmn_lopt.cli.command_line import one_line_for_the_machine, parse
from gmn_lopt.networks.gradmetanet import GradMetaNetConfig
from gmn_lopt.networks.gradmetanet_pp import GradMetaNetPlusPlusConfig
from gmn_lopt.networks.saved_editor import EditorError
from gmn_lopt.tasks.data.cache import DataError
from gmn_lopt.util.compilation_cache import keep_compiled
from gmn_lopt.util.errors import FileError, UsageError

# docs/inr_editing.md says what each of them costs.
QUICK = Setting(
    data="digits",
    train=512,
    valid=256,
    test=256,
    points=32,
    networks=("gmn",),
    methods=METHODS,
    width=16,
    layers=2,
    reader=GradMetaNetConfig(width=16, set_layers=1, neuron_layers=1, product_width=16, out_features=8),
    attention=GradMetaNetPlusPlusConfig(width=16, blocks=1, heads=1, product_width=16, out_features=8),
    probes=16,
    heads=4,
    pixels=128,
    steps=500,
    batch=16,
    learning_rate=3e-3,
)
SMALL = replace(QUICK, data="fashion_mnist", train=2304, points=64, pixels=256, steps=800)
# The paper trains for 150,000 steps, of still wider networks (appendix F.3).
LARGE = replace(
    SMALL,
    train=9000,
    networks=("dws", "gmn"),
    width=64,
    layers=4,
    reader=GradMetaNetConfig(width=64, set_layers=2, neuron_layers=1, product_width=64, out_features=8),
    attention=GradMetaNetPlusPlusConfig(width=32, blocks=2, heads=4, product_width=32, out_features=8),
    probes=64,
    heads=8,
    pixels=784,
    steps=20_000,
    batch=64,
    learning_rate=1e-3,
)
SETTINGS = {
    "quick": QUICK,
    "fashion_mnist_small": SMALL,
    "cifar10_small": replace(SMALL, data="cifar10"),
    "fashion_mnist": LARGE,
    "cifar10": replace(LARGE, data="cifar10", pixels=1024),
}


@dataclass(frozen=True)
class Config:
    """What to run."""

    out: Path = Path("runs/inr_editing")
    """Directory of the runs and of the report, one folder for each setting."""
    setting: Literal["quick", "fashion_mnist_small", "cifar10_small", "fashion_mnist", "cifar10"] = "quick"
    """Data and sizes; docs/inr_editing.md says what they cost."""
    networks: tuple[str, ...] = ()
    """Weight-space networks, of dws and gmn; default: the setting's."""
    methods: tuple[str, ...] = ()
    """What they read, of weights, probing, told, gradmetanet, gradmetanet++ and "gradmetanet x heads"; default: all."""
    seeds: int = 1
    """Seeds of every method: initial weights and batches."""
    steps: int | None = None
    """Training steps; default: the setting's."""
    data_dir: str | None = None
    """Directory of data sets (TensorFlow Datasets' layout); default: its own."""


def main(config: Config) -> str:
    """Do all runs that are not done, write the report after each, and return its table.

    Raises:
        UsageError, DataError: in one line, what cannot be done.
    """
    setting = SETTINGS[config.setting]
    networks, methods = config.networks or setting.networks, config.methods or setting.methods
    steps = setting.steps if config.steps is None else config.steps
    setting = replace(setting, networks=networks, methods=methods, steps=steps)
    if config.seeds < 1 or setting.steps < 1:
        raise UsageError("--seeds and --steps must be at least 1")
    for flag, names, known in (("--networks", networks, tuple(NETWORKS)), ("--methods", methods, METHODS)):
        if unknown := [name for name in names if name not in known]:
            raise UsageError(f"{flag} does not take {unknown[0]!r}: choose of {', '.join(known)}")
    splits = data.load(setting.data, setting.counts, config.data_dir)
    out = config.out / config.setting
    results, table = [], ""
    # Which runs a report is of is not what a run was trained with.
    trained = replace(setting, networks=(), methods=())
    for seed in range(config.seeds):  # outermost: all methods have a first result before any has a second
        for network in setting.networks:
            for method in setting.methods:
                place = out / f"{network} {method} seed {seed}".replace(" ", "_")
                results.append({**train(trained, network, method, seed, splits, place), "run": place})
                table = report.write(out, trained, splits, results)
    return table


def cli(args: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    config = parse(Config, __doc__, args)
    keep_compiled()
    try:
        with one_line_for_the_machine():
            print(main(config))
    except (UsageError, FileError, DataError, EditorError) as error:
        print(f"experiments.inr_editing: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"experiments.inr_editing: interrupted; the same command goes on from {config.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
