"""What each part of the denoised direction is worth: final losses with one of them changed, and of its neighbours.

Whole episodes with a known horizon (``tools.known_horizon``), each variant at the best of the peak rates given, by the
loss on the validation split at the end. The variants replace constants and functions of the modules for a run's time.

    python -m tools.ablation --data-dir DATA --task cifar10_mlp --steps 1000 --peak 0.02 0.04
"""

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from gmn_lopt.evaluation.training import mean_loss
from gmn_lopt.optimizers.directions import denoised, denoising, preconditioners, spreading
from gmn_lopt.tasks import load_task
from gmn_lopt.util.inverses import inverse_root
from tools.known_horizon import COEFFICIENTS, episode

Changes = Mapping[tuple[Any, str], Any]


def _noise(weight: float) -> Changes:
    left = preconditioners.noise_left
    return {(preconditioners, "noise_left"): lambda steps: weight * left(steps)}


def _damping(damping: float) -> Changes:
    return {(preconditioners, "DAMPING"): damping, (denoising, "DAMPING"): damping}


def _momentum(decay: float) -> Changes:
    return {(preconditioners, "MOMENTUM_DECAY"): decay, (denoised, "MOMENTUM_DECAY"): decay}


def _root(function: Callable[[Any], Any]) -> Changes:
    return {(preconditioners, "inverse_root"): function}


def _inverse(stack: Any) -> Any:
    root = inverse_root(stack)
    return root @ root


def _identity(stack: Any) -> Any:
    return jnp.broadcast_to(jnp.eye(stack.shape[1], dtype=stack.dtype), stack.shape)


UNWHITE = _damping(30.0)  # beside it C, whose mean of the diagonal is one, hardly counts
VARIANTS: dict[str, Changes] = {
    "as it is": {},
    "noise x 0: orthogonal where activations are white": _noise(0.0),
    **{f"noise x {weight}": _noise(weight) for weight in (0.3, 2.0, 4.0)},
    "no whitening": UNWHITE,
    "no whitening, noise x 0: Muon": {**UNWHITE, **_noise(0.0)},
    "no root: C^-1 M (FOOF, Benzing 2022)": _root(_identity),
    "inverse in place of its root": _root(_inverse),
    "noise x 100: C^-1 M G^-1/2": _noise(100.0),
    **{f"damping {damping}": _damping(damping) for damping in (0.1, 0.25, 1.0, 2.0)},
    **{f"momentum {decay}": _momentum(decay) for decay in (0.6, 0.9, 0.95)},
    **{f"moments {decay}": {(preconditioners, "MOMENTS_DECAY"): decay} for decay in (0.9, 0.98)},
    "new at every step": {(spreading, "EVERY"): 1},
}
"""What is replaced, by what it is called."""


def main() -> None:
    """Print a line of JSON for each task and variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--steps", type=int, help="horizon; that of the task unless given")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--peak", type=float, nargs="+", default=[0.02, 0.04])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    args = parser.parse_args()
    for name in args.task:
        task = load_task(name, args.data_dir)
        valid = jax.tree.map(jnp.asarray, task.data["valid"])
        loss = jax.jit(lambda params, split, task=task: mean_loss(task.loss, params, split, task.at_once))
        for variant in args.variant:
            jax.clear_caches()
            with contextlib.ExitStack() as changed:
                for (module, attribute), value in VARIANTS[variant].items():
                    changed.enter_context(mock.patch.object(module, attribute, value))
                run = episode(task, args.steps or task.horizon, "default")
                losses: dict[float, list[float]] = {peak: [] for peak in args.peak}
                for peak, seed in itertools.product(args.peak, range(args.seeds)):
                    coefficients = COEFFICIENTS | {"alpha": peak}
                    losses[peak].append(float(loss(run(jax.random.key(seed), *coefficients.values()), valid)))
            best = min(losses, key=lambda peak: float(np.mean(losses[peak])))
            row = {"task": name, "variant": variant, "peak": best, "loss": round(float(np.mean(losses[best])), 4)}
            row["deviation"] = round(float(np.std(losses[best], ddof=1)), 4)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
