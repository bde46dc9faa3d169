"""google/learned_optimization, both ways: https://github.com/google/learned_optimization.

Their objects are known by their methods, so that nothing here needs the package: it is imported when a user names
something of it, by :func:`load_task` and :func:`load_optimizer`.
"""

from gmn_lopt.interop.learned_optimization.named import PREFIX, module_of
from gmn_lopt.interop.learned_optimization.optimizers import LearnedOptimizer, Optimizer
from gmn_lopt.interop.learned_optimization.tasks import load_task, to_task
from gmn_lopt.interop.learned_optimization.transformation import load_optimizer, to_optax
from gmn_lopt.interop.learned_optimization.truncated_step import TruncatedStep

__all__ = [
    "PREFIX",
    "LearnedOptimizer",
    "Optimizer",
    "TruncatedStep",
    "load_optimizer",
    "load_task",
    "module_of",
    "to_optax",
    "to_task",
]
