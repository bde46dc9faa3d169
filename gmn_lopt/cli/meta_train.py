"""Meta-train a learned optimizer on a task.

meta_train.py --task digits_mlp --out runs/digits

Interrupt it at any time (Ctrl-C or SIGTERM: it finishes the meta-step, saves and exits with code 0) and continue with
meta_train.py --out runs/digits --resume

Where the settings come from: --preset best (the default: what was found to learn fastest, a matter of minutes) or
--preset paper (the paper's protocol: PES, 16 pairs, truncations of 50 steps, Adam at 1e-4 for 50,000 meta-steps).
--optimizer NAME chooses another recipe (they are listed below), of which flags like --optimizer.step-size.initial
change single fields. --stage ESTIMATOR:setting=value,setting=value,
given once for each stage, replaces the stages: --stage truncated:meta_steps=300,learning_rate=3e-3,truncation=25
--stage nres:meta_steps=400,pairs=8,schedule=cosine. Estimators are pes, nres (noise reuse), es (truncated evolution
strategies) and truncated (back-propagation); settings are the fields of gmn_lopt.meta.stages.Stage.

Several processes, on one machine or on many, compute one run together: one command each, with --coordinator HOST:PORT
--processes N --process-id I.
"""

import argparse
import copy
import dataclasses
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import tyro
from jaxtyping import PyTree

from gmn_lopt.cli.command_line import one_line_for_the_machine, parse
from gmn_lopt.meta.augmentation import AugmentedProblem
from gmn_lopt.meta.config import FREE, SPREAD, Config, from_json, names_a_module, to_json
from gmn_lopt.meta.mixture import MixtureProblem
from gmn_lopt.meta.presets import BEST, PRESETS
from gmn_lopt.meta.processes import check_same, connected, is_first, stop_signal
from gmn_lopt.meta.run import check_places, train
from gmn_lopt.meta.run_directory import RunDirectory, RunError, differences, holds_run, read_settings
from gmn_lopt.meta.sharding import unroll_shardings
from gmn_lopt.meta.stages import Stage, parse_stage
from gmn_lopt.meta.task import task_structure
from gmn_lopt.meta.training_problem import TrainingProblem
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer
from gmn_lopt.optimizers.leaves import tied_leaves
from gmn_lopt.optimizers.recipes import RECIPES, Recipe
from gmn_lopt.optimizers.saved import SerializationError, load_learned, load_recipe
from gmn_lopt.tasks import TASK_ERRORS, load_task
from gmn_lopt.tasks.mixture import make_all
from gmn_lopt.util import codec
from gmn_lopt.util.compilation_cache import keep_compiled
from gmn_lopt.util.errors import UsageError, first_line
from gmn_lopt.util.hardware import describe_hardware, use_all_cores
from gmn_lopt.util.spec import format_spec, parse_spec
from gmn_lopt.util.threads import one_blas_thread

MIXTURE = "mixture"


def main(config: Config) -> bool:
    """Meta-train; show progress on stderr.

    Returns:
        True when the run is complete, False when a signal ended it early (continue with ``resume=True``).

    Raises:
        UsageError, RunError: in one line, what cannot be done.
    """
    with stop_signal() as stop, connected(config.coordinator, config.processes, config.process_id):
        try:
            for stage in config.stages:
                unroll_shardings(stage.pairs)
            lopt, problem = make_problem(config)
            meta_steps = [stage.meta_step(problem) for stage in config.stages]
        except ValueError as error:
            raise UsageError(first_line(error)) from None
        if not config.resume:
            read_start(config, lopt)  # so that a wrong one is refused before there is a run directory
        with open_run(config) as run:
            total = sum(stage.meta_steps for stage in config.stages)
            if run.latest > total:
                file = run.path / "checkpoints" / str(run.latest)
                raise RunError(f"{file} is beyond the {total} meta-steps of the run; delete it to continue")
            check_places(config)
            if run.complete == total:
                if is_first():
                    print(f"{config.out} is complete: {total} meta-steps")
                return True
            # Where a checkpoint is going to replace them, the optimizer to start from need not be there any more.
            start = read_start(config, lopt) if run.latest == 0 else None
            phi = lopt.init(jax.random.fold_in(jax.random.key(config.seed), 0)) if start is None else start
            if is_first():
                print(
                    f"{config.task}: {sum(leaf.size for leaf in jax.tree.leaves(phi))} meta-parameters, {total} "
                    f"meta-steps, horizon {problem.horizon}, {jax.device_count()} {jax.default_backend()} device(s), "
                    f"run directory {run.path}",
                    file=sys.stderr,
                )
            return train(config, run, lopt, phi, problem, meta_steps, stop)


def make_problem(config: Config) -> tuple[LearnedOptimizer, TrainingProblem | MixtureProblem]:
    """The learned optimizer, and the training of the task, or of all tasks of the mixture, with it.

    Raises:
        UsageError: there is no such task, its data is missing, or the optimizer does not fit it.
    """
    try:
        name, settings = parse_spec(config.task)
        tasks = make_all(config.data_dir) if name == MIXTURE else (load_task(name, config.data_dir, **settings),)
        lopts = [config.optimizer.build(task_structure(task)) for task in tasks]
        if name != MIXTURE:
            return lopts[0], TrainingProblem(tasks[0], lopts[0], config.meta_loss, config.horizon)
        residual = config.optimizer.residual
        if residual is not None and residual.network.tied and len({tied_leaves(x.structure) for x in lopts}) > 1:
            raise ValueError("unf belongs to one model, but the tasks have several; train ds or ds+gmn on all of them")
        # A task's cap is 1.5 times the loss of knowing nothing: relative to it, all tasks count alike.
        weights = tuple(1.5 / task.loss_cap for task in tasks)
        settings = {"meta_loss": config.meta_loss, "steps": config.horizon, "rate_range": config.rate_range}
        return lopts[0], MixtureProblem(
            tuple(AugmentedProblem(task, lopt, **settings) for task, lopt in zip(tasks, lopts)), weights
        )
    except TASK_ERRORS as error:
        raise UsageError(f"--task {config.task!r}: {first_line(error)}") from error


def open_run(config: Config) -> RunDirectory:
    """Open or begin the run in ``config.out``."""
    packages = ("gmn_lopt", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}
    versions["hardware"] = describe_hardware()
    settings = to_json(config)
    keep_period = config.keep_every * config.checkpoint_every
    local = ("out", "data_dir", "resume")
    check_same(json.dumps({name: value for name, value in settings.items() if name not in local}))
    return RunDirectory(config.out, settings, versions, config.resume, FREE, config.keep, keep_period)


def read_start(config: Config, lopt: LearnedOptimizer) -> PyTree | None:
    """The meta-parameters to start from; None where they are to be drawn.

    Raises:
        UsageError: there is no such optimizer, or it was made from another recipe.
    """
    if config.start is None:
        return None
    try:
        found, phi = load_learned(config.start, lopt.structure)
    except SerializationError as error:
        raise UsageError(f"--start {config.start}: {error}") from None
    there, here = codec.to_json(Recipe.of(found)), codec.to_json(config.optimizer)
    if changed := "; ".join(differences(there, here, "optimizer")):
        raise UsageError(f"--start {config.start} has another recipe ({changed}); train it as it is")
    return phi


def from_command_line(description: str | None, args: Sequence[str]) -> Config:
    """Parse the command line; the defaults are the preset's, with ``--resume`` the settings of the run.

    Args:
        description: what ``--help`` says first.
        args: the command line, without the program's name.

    Raises:
        UsageError: in one line, what is not understood.
        SystemExit: after ``--help`` or a flag that there is not.
    """
    # A first pass finds what the defaults of all other flags come from.
    whole, look = (argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False) for _ in range(2))
    whole.add_argument("--preset", choices=PRESETS)
    whole.add_argument("--optimizer", choices=RECIPES)
    whole.add_argument("--stage", action="append")
    look.add_argument("--out", type=Path)
    look.add_argument("--start")
    look.add_argument("--task")
    look.add_argument("--resume", action="store_true")
    try:
        chosen, rest = whole.parse_known_args(args)
        found, _ = look.parse_known_args(rest)
        resuming = found.resume and found.out and "--help" not in args and holds_run(found.out)
        if found.resume and found.out and not found.task and not resuming and "--help" not in args:
            raise UsageError(f"--resume: there is no run in --out {found.out} yet; give --task to begin one")
        default = PRESETS[chosen.preset or "best"]
        if resuming:
            run = from_json(read_settings(found.out), found.out / "config.json")
            if not found.task and names_a_module(run.task):
                raise UsageError(
                    f"--resume: the task of the run in {found.out} is made by the module that config.json names, "
                    f"{run.task}; add --task {shlex.quote(run.task)} if that is to be executed"
                )
            # A preset that is given again is compared with the run's settings, like everything else.
            default = replace(run, optimizer=default.optimizer, stages=default.stages) if chosen.preset else run
        if found.start and not resuming:
            if chosen.optimizer:
                raise UsageError("--start brings an optimizer, and --optimizer another; give one of them")
            default = replace(default, optimizer=load_recipe(found.start))
        if chosen.optimizer:
            default = replace(default, optimizer=RECIPES[chosen.optimizer])
        if chosen.stage:
            default = replace(default, stages=tuple(parse_stage(text) for text in chosen.stage))
        if not resuming:
            default = copy.copy(default)
            for name in ("task", "out"):  # no value of their types says that a flag has to be given
                object.__setattr__(default, name, tyro.MISSING)
        return parse(Config, description, rest, default=default)
    except (ValueError, argparse.ArgumentError) as error:
        raise UsageError(first_line(error)) from None


def to_command_line(config: Config) -> list[str]:
    """The arguments that :func:`from_command_line` makes this configuration of, but for ``resume`` and processes.

    Raises:
        ValueError: the optimizer has other parts than every recipe, which only Python can say.
    """
    words = ["--task", config.task, "--out", str(config.out)]
    if config.start is None:
        wanted = codec.to_json(config.optimizer)
        found = {name: _flags(codec.to_json(recipe), wanted, "--optimizer") for name, recipe in RECIPES.items()}
        possible = {name: flags for name, flags in found.items() if flags is not None}
        if not possible:
            raise ValueError("no recipe has the parts of this optimizer")
        nearest = min(possible, key=lambda name: len(possible[name]))
        words += ["--optimizer", nearest, *possible[nearest]]
    for stage in config.stages:
        values, usual = dataclasses.asdict(stage), dataclasses.asdict(Stage())
        own = {name: x for name, x in values.items() if name != "estimator" and x != usual[name]}
        words += ["--stage", format_spec(stage.estimator, own)]
    for name in (f.name for f in dataclasses.fields(Config)):
        value = getattr(config, name)
        if name not in ("task", "out", "optimizer", "stages", "resume", *SPREAD) and value != getattr(BEST, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _flags(old: Any, new: Any, flag: str) -> list[str] | None:
    """The flags that make ``new`` of ``old``, as JSON values; None: there are none."""
    if isinstance(old, dict) and isinstance(new, dict) and old["name"] == new["name"]:
        found = [_flags(old[key], new[key], f"{flag}.{key.replace('_', '-')}") for key in old]
        return None if None in found else [word for words in found for word in words or ()]
    if isinstance(old, dict) or isinstance(new, dict):
        return None
    return [] if old == new else [flag, *map(str, new if isinstance(new, list) else (new,))]


def cli(args: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    use_all_cores()
    one_blas_thread()
    try:
        description = f"{__doc__}\nOptimizers: {', '.join(RECIPES)}."
        with one_line_for_the_machine():
            config = from_command_line(description, sys.argv[1:] if args is None else args)
            keep_compiled()
            main(config)
    except (UsageError, RunError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    return 0
