"""Final losses of ``default`` over the coefficients of its schedule for a known horizon: what they were chosen by.

Whole episodes are trained, and the loss on the validation split is taken at their end, so that nothing is truncated.

    python -m tools.known_horizon --data-dir DATA --task cifar10_mlp --alpha 0.01 0.02 0.03 --decay 0 0.1
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gmn_lopt
from gmn_lopt.evaluation.training import mean_loss
from gmn_lopt.meta.task import Task, task_structure
from gmn_lopt.optimizers.horizon import Horizon
from gmn_lopt.optimizers.saved import load_learned
from gmn_lopt.tasks import load_task
from gmn_lopt.tasks.mixture import make_all
from gmn_lopt.util.spec import parse_spec

COEFFICIENTS = Horizon().coefficients()


def episode(task: Task, total_steps: int, name: str) -> Callable[..., Any]:
    """``run(key, *coefficients)``: the parameters at the end, one program for all values of ``COEFFICIENTS``."""
    structure, train = task_structure(task), jax.tree.map(jnp.asarray, task.data["train"])
    lopt, phi = load_learned(name, structure)
    lopt = replace(lopt, step_size=Horizon())

    @jax.jit
    def run(key: Any, *coefficients: Any) -> Any:
        own = {f"log_{name}": jnp.log(jnp.float32(x)) for name, x in zip(COEFFICIENTS, coefficients, strict=True)}
        tx = lopt.optimizer(phi | {"step_size": own}, total_steps=total_steps)
        first, batches = jax.random.split(key)
        params = task.init(first)

        def step(carry: Any, key: Any) -> Any:
            params, state = carry
            batch = task.sample(key, train)
            _, grads, factors = gmn_lopt.value_grad_and_factors(task.loss)(params, batch)
            updates, state = tx.update(grads, state, params, factors=factors)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(batches, total_steps))[0][0]

    return run


def tasks(spec: str, data_dir: str | None) -> tuple[Task, ...]:
    """A task, with its settings; all of the mixture."""
    name, settings = parse_spec(spec)
    return make_all(data_dir) if name == "mixture" else (load_task(name, data_dir, **settings),)


def main() -> None:
    """Print a line of JSON for each task and choice of coefficients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--optimizer", default="default")
    parser.add_argument("--steps", type=int, help="horizon; that of the task unless given")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--split", default="valid", choices=("valid", "test"))
    for name, value in COEFFICIENTS.items():
        parser.add_argument(f"--{name}", type=float, nargs="+", default=[value])
    args = parser.parse_args()
    for task in (task for name in args.task for task in tasks(name, args.data_dir)):
        steps, split = args.steps or task.horizon, jax.tree.map(jnp.asarray, task.data[args.split])
        run = episode(task, steps, args.optimizer)
        loss = jax.jit(lambda params, split, task=task: mean_loss(task.loss, params, split, task.at_once))
        for choice in itertools.product(*(getattr(args, name) for name in COEFFICIENTS)):
            start = time.monotonic()
            losses = [float(loss(run(jax.random.key(seed), *choice), split)) for seed in range(args.seeds)]
            row = {"task": task.name, "steps": steps, "optimizer": args.optimizer, **dict(zip(COEFFICIENTS, choice))}
            row |= {"loss": round(float(np.mean(losses)), 4), "deviation": round(float(np.std(losses, ddof=1)), 4)}
            print(json.dumps(row | {"seconds": round(time.monotonic() - start, 1)}), flush=True)


if __name__ == "__main__":
    main()
