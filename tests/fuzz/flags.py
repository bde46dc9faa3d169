"""Senseless flags of both commands: all are parsed and checked, and the task and the optimizers made; nothing runs."""

import contextlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from gmn_lopt.cli import eval as evaluation
from gmn_lopt.cli import meta_train

from .outcomes import IDENTICAL, Outcome, Refusal, command, outcome

REFUSALS = (Refusal,)
# What is refused wherever a number is asked for.
SENSELESS = ("", "nan", "-inf", "1e400", "1j", "True", "9" * 20, "9" * 5000, "x" * 5000, "-" * 3000, "[1]", "\udcff")
VALUES = (*SENSELESS, *("-1", "0", "1", "1.5", "1e-320", "1e300", "None", "{}", str(2**31), str(2**63), "=", ":", ","))
VALUES += (
    "(" * 500,
    "'" * 3,
    "a\x1b[31mb\nc",
    "a\x00b",
    "%s%n",
    "\u202e",
    "..",
    "/dev/zero",
    "/proc/self/mem",
    "a/" * 2000,
)
VALUES += ("__import__('os').system('touch planted')", "0777", "1if", "'\\d'", "é" * 200, "a" * 256, "x=1", "x:y=1")
TRAIN = (
    "--task",
    "linear_regression",
    "--out",
    "run",
    "--optimizer",
    "ds+gmn",
    "--stage",
    "pes:meta_steps=2,truncation=5",
)
EVAL = ("--task", "linear_regression", "--out", "report", "--optimizer", "optax:sgd:learning_rate=0.1")
TRAIN_NUMBERS = (
    *("--seed {}", "--horizon {}", "--rate-range {}", "--log-every {}", "--keep {}", "--processes {}"),
    *("--optimizer.step-size.initial {}", "--optimizer.residual.weight {}", "--optimizer.residual.network.width {}"),
    *("--optimizer.residual.output-scale {}", "--optimizer.residual.gradmetanet.network.set-layers {}"),
    *("--optimizer.direction.decay {}", "--optimizer.residual.gradmetanet.max-output-size {}"),
    *("--stage pes:pairs={}", "--stage pes:meta_steps={}", "--stage pes:learning_rate={}", "--stage pes:sigma={}"),
    *("--stage pes:turns={}", "--stage pes:coefficient_rate={}", "--stage pes:truncation={}"),
    *("--task linear_regression:batch_size={}", "--task linear_regression:horizon={}"),
)
TRAIN_WORDS = (
    *("--task {}", "--task {}:make", "--task linear_regression:{}", "--out {}", "--optimizer {}", "--stage {}"),
    *(
        "--stage pes:{}",
        "--start {}",
        "--preset {}",
        "--meta-loss {}",
        "--data-dir {}",
        "--{}",
        "{}",
        "--coordinator {}",
    ),
)
EVAL_NUMBERS = (
    *("--seeds {}", "--first-seed {}", "--horizon {}", "--eval-every {}", "--smoothing {}", "--trials-at-once {}"),
    *("--timing-rounds {}", "--task linear_regression:batch_size={}", "--transfer linear_regression:horizon={}"),
    *("--optimizer optax:adam:learning_rate={}", "--optimizer default:learning_rate={}"),
    *("--optimizer default:weight_decay={}"),
)
EVAL_WORDS = (
    *("--task {}", "--out {}", "--optimizer {}", "--optimizer optax:{}", "--optimizer {}=default", "--transfer {}"),
    *(
        "--optimizer optax:adam:b1={},learning_rate=0.1",
        "--split {}",
        "--protocol {}",
        "--baseline {}",
        "--data-dir {}",
        "--{}",
        "{}",
        "--transfer linear_regression:{}",
    ),
)
FLAGS = [("train", flag, True) for flag in TRAIN_NUMBERS] + [("train", flag, False) for flag in TRAIN_WORDS]
FLAGS += [("eval", flag, True) for flag in EVAL_NUMBERS] + [("eval", flag, False) for flag in EVAL_WORDS]


def cases() -> Iterator[tuple[str, list[str], bool]]:
    """The command, its flags, and whether they have to be refused."""
    for name, flag, number in FLAGS:
        for value in VALUES:
            given = [word.replace("{}", value) for word in flag.split(" ")]
            refused = number and value in SENSELESS
            yield name, given, refused


def some(rng: random.Random, count: int) -> list[tuple[str, list[str], bool]]:
    """A random part of them, each flag among them."""
    everything, each = list(cases()), len(VALUES)
    few = [everything[i + rng.randrange(each)] for i in range(0, len(everything), each)]
    return few + rng.sample(everything, min(len(everything), max(0, count - len(few))))


def run(name: str, flags: list[str]) -> None:
    """Call the command, which stops before it computes anything."""
    if name == "train":
        with mock.patch.object(meta_train, "train", lambda *_: True):
            command(meta_train.cli, [*TRAIN, *flags])
    else:
        with (
            mock.patch.object(evaluation, "evaluate", lambda problem: ({}, None, [])),
            mock.patch.object(evaluation, "table", lambda report: ""),
            mock.patch.object(evaluation, "transfer_table", lambda reports: ""),
        ):
            command(evaluation.cli, [*EVAL, *flags])


def called(name: str, flags: list[str], must_be_refused: bool, place: Path) -> Outcome:
    """Call it in an empty directory, and say what came of it."""
    place.mkdir()
    try:
        with contextlib.chdir(place):
            found = outcome(lambda: run(name, flags), REFUSALS, None)
        if (place / "planted").exists():
            return Outcome("executed what was planted")
        return Outcome("senseless, and accepted") if must_be_refused and found.kind == IDENTICAL else found
    finally:
        shutil.rmtree(place)
