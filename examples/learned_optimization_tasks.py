"""learned_optimization, both ways: ``python examples/learned_optimization_tasks.py``."""

import importlib.util
from typing import Any

import jax
import numpy as np

import gmn_lopt
from gmn_lopt.evaluation import compare
from gmn_lopt.interop.learned_optimization import Optimizer
from gmn_lopt.meta.task import task_structure
from gmn_lopt.tasks import load_task

MISSING = "learned_optimization is not installed; docs/learned_optimization.md says how"
ADAM = "learned_optimization:learned_optimization.optimizers.base:Adam:learning_rate=0.01"


def digits(batch_size: int = 128):
    """Their network for images, and their data sets, on scikit-learn's digits."""
    # Imported here: what JAX no longer has was put back when this function was named.
    from learned_optimization.tasks.datasets import base
    from learned_optimization.tasks.fixed.image_mlp import _MLPImageTask

    own = load_task("digits_mlp").data

    def batches(split: str):
        images, labels = (np.asarray(own[split][name]) for name in ("image", "label"))
        while True:
            chosen = np.random.randint(0, len(labels), batch_size)
            yield {"image": images[chosen], "label": labels[chosen]}

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), next(batches("train")))
    splits = [batches(split) for split in ("train", "valid", "valid", "test")]
    return _MLPImageTask(base.Datasets(*splits, {"num_classes": 10}, abstract), [32])


def main(steps: int = 200) -> float | None:
    """Train their task through their interface, then compare; returns the last loss, None without the package."""
    if importlib.util.find_spec("learned_optimization") is None:
        print(MISSING)
        return None
    # "--task learned_optimization:MODULE:NAME" of the commands; here the function above.
    task = load_task(f"learned_optimization:{__name__}:digits", horizon=steps)
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
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")
    quick: dict[str, Any] = {"baseline": ("adamw",), "seeds": 2, "trials_at_once": 3, "timing_rounds": 1}
    print(compare(task, ["default", ADAM], **quick).table)
    return losses[-1]


if __name__ == "__main__":
    main()
