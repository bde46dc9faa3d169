"""The tasks of experiments/transfer, and the table that is made of their reports."""

import jax
import jax.numpy as jnp
import pytest

import gmn_lopt
from experiments.transfer.__main__ import TASKS, Config, main, row, summary
from gmn_lopt.evaluation.training import mean_loss
from gmn_lopt.meta.task import task_structure
from gmn_lopt.util.errors import UsageError


@pytest.mark.parametrize("name", TASKS)
def test_nearly_all_of_a_task_takes_the_denoised_step_and_it_can_be_trained(name):
    task = TASKS[name]()
    structure = task_structure(task)
    assert task.name == name and {"train", "valid", "test"} <= set(task.data)
    treatment = gmn_lopt.Denoised().treatment(structure)
    denoised = sum(p.size for p, t in zip(structure.parameters, treatment) if t.startswith("the denoised step"))
    assert denoised >= 0.85 * sum(p.size for p in structure.parameters)

    def after(key):
        params, batch = task.init(key), task.sample(key, jax.tree.map(jnp.asarray, task.data["train"]))
        tx = gmn_lopt.load("default", structure, total_steps=task.horizon)
        loss, grads, factors = gmn_lopt.value_grad_and_factors(task.loss)(params, batch)
        return loss, tx.update(grads, tx.init(params), params, factors=factors)[0], params

    loss, updates, params = jax.eval_shape(after, jax.random.key(0))
    assert loss.shape == () and updates == params


@pytest.mark.parametrize("name", ["pinn", "matrix_factorisation", "graph_network", "contrastive", "autoencoder"])
def test_a_task_starts_between_nothing_and_its_cap(name):
    task = TASKS[name]()
    loss = mean_loss(task.loss, task.init(jax.random.key(0)), task.data["test"], task.at_once)
    assert 0 < loss < task.loss_cap


def report(finals, steps, misses=0):
    names = ("adamw", "muon", "known", "default")
    rows = [{"name": n, "final_test_loss": {"mean": f}} for n, f in zip(names, finals)]
    rows[2] |= {"steps_to_goal": {"mean": steps}, "misses": misses}
    return {"optimizers": rows, "goal": {"name": "muon"}, "settings": {"horizon": 100}}


def test_the_table_counts_wins_and_takes_a_miss_for_no_gain():
    rows = {
        "a": row(report([2.0, 1.0, 0.5, 3.0], 50.0), 2),
        "b": row(report([2.0, 1.0, 1.5, None], None, misses=3), 2),
        "c": row(report([2.0, 1.0, 0.9, 3.0], 80.0), 2),
    }
    lines = summary(rows).splitlines()
    assert lines[2] == "| a | 2 | 1 | 0.5 | 3 | 2.00 |"
    assert lines[3] == "| b | 2 | 1 | 1.5 | inf | missed |"
    assert lines[-1] == "Ahead at the end on 2 of 3; median of the factors 1.25."


def test_a_task_that_there_is_not_is_refused_with_the_names_of_those_that_are():
    with pytest.raises(UsageError, match="there is no task 'vitt'; there are vit, cnn"):
        main(Config(task=("vitt",)))
