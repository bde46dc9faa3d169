"""Their task with our optimizer, and their optimizers in our table: ``python examples/learned_optimization_tasks.py``."""

import importlib.util

import jax
import jax.numpy as jnp

import gmn_lopt
from gmn_lopt.evaluation import compare
from gmn_lopt.interop.learned_optimization import Optimizer
from gmn_lopt.meta.task import task_structure
from gmn_lopt.tasks import load_task

TASK = "learned_optimization:learned_optimization.tasks.quadratics:SumQuadraticTask"
ADAM = "learned_optimization:learned_optimization.optimizers.base:Adam:learning_rate=0.1"
MISSING = "learned_optimization is not installed; docs/learned_optimization.md says how"


def main(steps: int = 50) -> float | None:
    """Train one of their tasks by their interface, then compare; returns the last loss, None without the package."""
    if importlib.util.find_spec("learned_optimization") is None:
        print(MISSING)
        return None
    task = load_task(TASK, horizon=steps)
    opt = Optimizer(gmn_lopt.load("default", task_structure(task)))
    state = opt.init(task.init(jax.random.key(0)))

    @jax.jit
    def update(state, key):
        batch = task.sample(key, task.data["train"])
        loss, grads, factors = gmn_lopt.value_grad_and_factors(task.loss)(opt.get_params(state), batch)
        return opt.update(state, grads, loss=loss, factors=factors), loss

    losses = []
    for key in jax.random.split(jax.random.key(1), steps):
        state, loss = update(state, key)
        losses.append(loss)
    first, last = map(float, (losses[0], jnp.array(losses)[-1]))
    print(f"loss {first:.3f} before, {last:.3f} after {steps} steps")
    quick = {"baseline": ("adamw",), "seeds": 2, "trials_at_once": 3, "timing_rounds": 1}
    print(compare(task, ["default", ADAM], **quick).table)
    return last


if __name__ == "__main__":
    main()
