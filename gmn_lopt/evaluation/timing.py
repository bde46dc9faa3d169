"""Wall-clock time per training step, of all optimizers in turn."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from gmn_lopt.evaluation.candidate import Candidate, train_step
from gmn_lopt.evaluation.training import run_keys
from gmn_lopt.meta.task import Task


def time_per_step(
    task: Task,
    candidates: Sequence[Candidate],
    *,
    rounds: int = 11,
    seconds: float = 0.05,
    progress: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Float[np.ndarray, "candidates rounds"]:
    """Measure the time of one training step of each candidate, in seconds.

    A step is one call of one compiled function, not vmapped, its state donated: forward and backward pass, factors if
    the optimizer needs them, update. Drawing the batch is not part of it. Every round measures all candidates one
    after the other, each round beginning with another one, so that a machine that gets busy or hot slows them alike.

    Args:
        task: the task.
        candidates: the optimizers.
        rounds: number of measurements of each.
        seconds: about how long one measurement takes; it counts as many steps as fit.
        progress: called after each measurement.
        clock: what to measure time with; ``time.process_time`` counts no waiting for a processor that others use.

    Returns:
        Time per step of each measurement; the median over rounds is what to report.
    """
    init_key, batch_key = run_keys(0)
    batch = jax.jit(task.sample)(jax.random.fold_in(batch_key, 0), task.data["train"])

    states, steps = [], []
    for candidate in candidates:
        params = jax.jit(task.init)(init_key)
        state = (params, jax.jit(candidate.make(candidate.hyper).init)(params))
        # Donation needs every buffer once; an initial state may hold the same constant several times.
        state = jax.tree.map(lambda x: x.copy(), state)
        _, state = _measure(task, candidate, batch, state, 2, clock)  # compiles
        duration, state = _measure(task, candidate, batch, state, 5, clock)
        states.append(state)
        steps.append(max(3, round(seconds / duration)))

    times = np.zeros((len(candidates), rounds))
    for r in range(rounds):
        for i in (*range(r % len(candidates), len(candidates)), *range(r % len(candidates))):
            times[i, r], states[i] = _measure(task, candidates[i], batch, states[i], steps[i], clock)
            progress()
    return times


def _measure(
    task: Task, candidate: Candidate, batch: Any, state: Any, steps: int, clock: Callable[[], float]
) -> tuple[float, Any]:
    step = partial(_step, loss=task.loss, make=candidate.make, needs_factors=candidate.needs_factors)
    jax.block_until_ready(state)
    start = clock()
    for _ in range(steps):
        state = step(state, candidate.hyper, batch)
    jax.block_until_ready(state)
    return (clock() - start) / steps, state


@partial(jax.jit, static_argnames=("loss", "make", "needs_factors"), donate_argnames="state")
def _step(state, hyper, batch, *, loss, make, needs_factors):
    params, opt_state = state
    params, opt_state, _ = train_step(loss, make(hyper), needs_factors, params, opt_state, batch)
    return params, opt_state
