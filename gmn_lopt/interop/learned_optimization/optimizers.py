"""Our optimizers in their interfaces, for their trainers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from gmn_lopt.factors.structure import Factors
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer as Ours


class OptimizerState(NamedTuple):
    """State of an :class:`Optimizer`, with the fields that their code reads.

    Attributes:
        params: the parameters that are trained.
        state: the model state; None where the task has none.
        optax_opt_state: the transformation's state.
        iteration: number of updates.
    """

    params: PyTree
    state: PyTree
    optax_opt_state: PyTree
    iteration: Int[Array, ""]


@dataclass(frozen=True, eq=False)
class Optimizer:
    """An optax transformation with the methods of learned_optimization's ``Optimizer``.

    Theirs for optax hands the transformation a gradient only. This one has ``factors`` as one more argument of
    ``update``, and hands the loss on as ``value``. Compared by identity: for their trainers it is a static argument.

    Attributes:
        opt: any optax transformation, such as :func:`gmn_lopt.load` returns.
        name: what their reports call it.

    Example:
        >>> w = jnp.ones((3, 2))
        >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
        >>> opt = Optimizer(gmn_lopt.load("default", gmn_lopt.analyze(loss, w, jnp.ones((4, 3)))))
        >>> state = opt.init(w)
        >>> value, grads, factors = gmn_lopt.value_grad_and_factors(loss)(opt.get_params(state), jnp.ones((4, 3)))
        >>> state = opt.update(state, grads, loss=value, factors=factors)
        >>> int(state.iteration)
        1
    """

    opt: optax.GradientTransformation
    name: str = "gmn_lopt"

    def init(
        self,
        params: PyTree,
        model_state: PyTree = None,
        num_steps: Any = None,
        key: jax.Array | None = None,
        **kwargs: Any,
    ) -> OptimizerState:
        """The state before the first update; ``num_steps`` and ``key`` are not used."""
        return OptimizerState(params, model_state, self.opt.init(params), jnp.zeros((), jnp.int32))

    def get_params(self, state: OptimizerState) -> PyTree:
        """The parameters."""
        return state.params

    def get_state(self, state: OptimizerState) -> PyTree:
        """The model state."""
        return state.state

    def get_params_state(self, state: OptimizerState) -> tuple[PyTree, PyTree]:
        """Both."""
        return state.params, state.state

    def set_params(self, state: OptimizerState, params: PyTree) -> OptimizerState:
        """The state with other parameters."""
        return state._replace(params=params)

    def update(
        self,
        opt_state: OptimizerState,
        grad: PyTree,
        loss: Any = None,
        model_state: PyTree = None,
        key: jax.Array | None = None,
        factors: Factors | None = None,
        **kwargs: Any,
    ) -> OptimizerState:
        """Take one step.

        Args:
            opt_state: the state.
            grad: the gradient, shaped like the parameters.
            loss: the loss before the step.
            model_state: the model state after the step's loss.
            key: not used, as further arguments.
            factors: of :func:`gmn_lopt.value_grad_and_factors`, for optimizers that read them.

        Raises:
            ValueError: the optimizer reads factors and there are none: their trainers hand over none, but for
                :class:`TruncatedStep`.
        """
        extra = {name: x for name, x in (("value", loss), ("factors", factors)) if x is not None}
        params = opt_state.params
        updates, state = optax.with_extra_args_support(self.opt).update(
            grad, opt_state.optax_opt_state, params, **extra
        )
        return OptimizerState(optax.apply_updates(params, updates), model_state, state, opt_state.iteration + 1)


@dataclass(frozen=True, eq=False)
class LearnedOptimizer:
    """A learned optimizer of ours with the methods of learned_optimization's ``LearnedOptimizer``.

    Their meta-parameters ``theta`` are our ``phi``. One that reads factors needs :class:`TruncatedStep`.

    Attributes:
        lopt: the learned optimizer, for the model of the task that it is to be meta-trained on.
        name: what their reports call it.

    Example:
        >>> w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
        >>> structure = gmn_lopt.analyze(lambda w, x: jnp.mean((x @ w) ** 2), w, x)
        >>> learned = LearnedOptimizer(gmn_lopt.recipe("ds", structure))
        >>> opt = learned.opt_fn(learned.init(jax.random.key(0)))
        >>> opt.update(opt.init(w), jnp.ones((3, 2)), loss=jnp.float32(9)).params.shape
        (3, 2)
    """

    lopt: Ours
    name: str = "gmn_lopt"

    def init(self, key: jax.Array) -> PyTree:
        """Draw meta-parameters."""
        return self.lopt.init(key)

    def opt_fn(self, theta: PyTree, is_training: bool = False) -> Optimizer:
        """The optimizer that meta-parameters define; the same in meta-training and after it."""
        return Optimizer(self.lopt.optimizer(theta), self.name)
