"""Wall-clock time per training step, of all optimizers in turn, and whether the machine was busy meanwhile."""

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from gmn_lopt.evaluation.training import Candidate, run_keys, train_step
from gmn_lopt.meta.task import Task
from gmn_lopt.util.threads import one_core

PROBE = 0.005  # seconds of processor time after each measurement, in which waiting for a processor is measured


class Timing(NamedTuple):
    """What was measured.

    Attributes:
        seconds: time per step of each measurement; the median over rounds is what to report.
        one_core: whether all was computed by one core.
        waiting: the part of the time in which this process was ready to compute, but other work had the processor: 0 on
            an idle machine, a half where one other process shares the core.
    """

    seconds: Float[np.ndarray, "candidates rounds"]
    one_core: bool
    waiting: float


def time_per_step(
    task: Task,
    candidates: Sequence[Candidate],
    *,
    rounds: int = 11,
    seconds: float = 0.05,
    on_one_core: bool = False,
    progress: Callable[[], Any] = lambda: None,
) -> Timing:
    """Measure the time of one training step of each candidate, in seconds.

    A step is one call of one compiled function, not vmapped, its state donated: forward and backward pass, factors if
    the optimizer needs them, update. Drawing the batch is not part of it. Every round measures all candidates one
    after the other, each round beginning with another one, so that a machine that gets busy or hot slows them alike.

    Args:
        task: the task.
        candidates: the optimizers.
        rounds: number of measurements of each.
        seconds: about how long one measurement takes; it counts as many steps as fit.
        on_one_core: whether to compute on one core, where the system allows to ask for it. The steps of small models
            gain nothing from several, and with other work on the machine their threads wait for each other.
        progress: called after each measurement.
    """
    init_key, batch_key = run_keys(0)
    batch = jax.jit(task.sample)(jax.random.fold_in(batch_key, 0), task.data["train"])
    times = np.zeros((len(candidates), rounds))
    waited = 0.0
    states, steps = [], []
    with one_core() if on_one_core else contextlib.nullcontext(False) as alone:
        for candidate in candidates:
            params = jax.jit(task.init)(init_key)
            state = (params, jax.jit(candidate.make(candidate.hyper).init)(params))
            # Donation needs every buffer once; an initial state may hold the same constant several times.
            state = jax.tree.map(lambda x: x.copy(), state)
            _, state = _measure(task, candidate, batch, state, 2)  # compiles
            duration, state = _measure(task, candidate, batch, state, 5)
            states.append(state)
            steps.append(max(3, round(seconds / duration)))
        for r in range(rounds):
            for i in (*range(r % len(candidates), len(candidates)), *range(r % len(candidates))):
                times[i, r], states[i] = _measure(task, candidates[i], batch, states[i], steps[i])
                waited += _probe()
                progress()
    return Timing(times, alone, waited / (waited + PROBE * times.size))


def _probe() -> float:
    """Seconds that a loop of ``PROBE`` seconds waits for the processor, because other work has it."""
    wall, processor = time.perf_counter(), time.thread_time()
    while time.thread_time() - processor < PROBE:
        pass
    return max(0.0, time.perf_counter() - wall - (time.thread_time() - processor))


def _measure(task: Task, candidate: Candidate, batch: Any, state: Any, steps: int) -> tuple[float, Any]:
    step = partial(_step, loss=task.loss, make=candidate.make, needs_factors=candidate.needs_factors)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(steps):
        state = step(state, candidate.hyper, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / steps, state


@partial(jax.jit, static_argnames=("loss", "make", "needs_factors"), donate_argnames="state")
def _step(state, hyper, batch, *, loss, make, needs_factors):
    params, opt_state = state
    params, opt_state, _ = train_step(loss, make(hyper), needs_factors, params, opt_state, batch)
    return params, opt_state
