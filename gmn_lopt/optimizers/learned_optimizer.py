"""Learned optimizers: update rules with meta-trained parts, as optax gradient transformations."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from gmn_lopt.factors.parallel import leave_to_compiler
from gmn_lopt.factors.structure import Factors, GradientStructure, StructureError
from gmn_lopt.optimizers.directions import Direction, Momentum
from gmn_lopt.optimizers.horizon import Horizon
from gmn_lopt.optimizers.leaves import (
    Gradient,
    Mask,
    check_meta_parameters,
    factors_per_element,
    masked_leaves,
    match_leaves,
)
from gmn_lopt.optimizers.residual import Residual
from gmn_lopt.optimizers.rules import Additive, Rule
from gmn_lopt.optimizers.step_size import Constant, Sizes, StepSize, StepSizeState

Scalar = float | Array
LearningRate = Scalar | Callable[[Array], Any]


class LearnedOptimizerState(NamedTuple):
    """State of a learned optimizer, a pytree of arrays: the number of steps taken, and the states of its parts.

    Example:
        >>> w = jnp.ones((3, 2))
        >>> structure = gmn_lopt.analyze(lambda w, x: jnp.mean((x @ w) ** 2), w, jnp.ones((4, 3)))
        >>> lopt = LearnedOptimizer(structure)
        >>> state = lopt.optimizer(lopt.init(jax.random.key(0))).init(w)
        >>> int(state.step), state.direction.shape  # momentum
        (0, (3, 2))
    """

    step: Int[Array, ""]
    direction: PyTree
    residual: PyTree
    step_size: PyTree


@dataclass(frozen=True)
class LearnedOptimizer:
    """A learned optimizer for one model, composed of parts (arXiv:2507.01649, section 6).

    The update is ``-eta D``, with ``D`` made by the ``rule`` of a ``direction`` ``v`` and a ``residual`` ``beta F``;
    the paper's is ``D = v + beta F`` with momentum ``v`` and a constant ``eta``. Each part has its own coefficients and
    state, and can be replaced without touching the others; :data:`gmn_lopt.optimizers.recipes.RECIPES` has named
    compositions. Meta-parameters ``phi`` are nested alike: ``phi["direction"]``, ``phi["residual"]``,
    ``phi["step_size"]``, with a coefficient's logarithm as ``log_NAME`` and the weights of networks.

    Attributes:
        structure: the structure of the model, from :func:`gmn_lopt.analyze`.
        direction: the hand-designed part.
        residual: the network's part; None: the direction with learned coefficients.
        rule: how both make a step.
        step_size: its size.

    Example:
        >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
        >>> lopt = LearnedOptimizer(gmn_lopt.analyze(loss, params, x), step_size=Constant(0.5))
        >>> phi = lopt.init(jax.random.key(0))
        >>> tx = lopt.optimizer(phi)
        >>> updates, state = tx.update(jax.grad(loss)(params, x), tx.init(params), params)
    """

    structure: GradientStructure
    direction: Direction = field(default_factory=Momentum)
    residual: Residual | None = None
    rule: Rule = field(default_factory=Additive)
    step_size: StepSize = field(default_factory=Constant)

    @property
    def needs_factors(self) -> bool:
        """Whether ``update`` has to be given ``factors``."""
        parts = (self.direction, self.residual, self.step_size)
        return any(part is not None and part.needs_factors(self.structure) for part in parts)

    @property
    def wants_total_steps(self) -> bool:
        """Whether :meth:`optimizer` has to be given ``total_steps``, unless it is given a learning rate."""
        return self.step_size.wants_total_steps

    def init(self, key: jax.Array) -> PyTree:
        """Draw meta-parameters: float32 arrays whose shapes do not depend on the structure (but see ``UNF``)."""
        parts = {"direction": self.direction, "residual": self.residual, "step_size": self.step_size}
        phi: dict[str, Any] = {
            name: _logarithms(part.coefficients()) for name, part in parts.items() if part is not None
        }
        if self.residual is not None:
            phi["residual"] |= self.residual.init_weights(key, self.structure, self.rule.outputs)
        phi["step_size"] |= self.step_size.init_weights(jax.random.fold_in(key, 1), self.structure)
        return phi

    def template(self) -> PyTree:
        """The shapes and dtypes of the meta-parameters, as :meth:`init` draws them."""
        return _template(self)

    def scalars(self, phi: PyTree) -> dict[str, Float[Array, ""]]:
        """The coefficients by name, for monitoring, such as ``alpha``, ``beta`` and ``mu``."""
        values = {
            name.removeprefix("log_"): jnp.exp(value)
            for part in phi.values()
            for name, value in part.items()
            if name.startswith("log_")
        }
        if "one_minus_mu" in values:
            values["mu"] = 1.0 - values.pop("one_minus_mu")
        return values

    def optimizer(
        self,
        phi: PyTree,
        learning_rate: LearningRate | None = None,
        weight_decay: Scalar | None = None,
        total_steps: int | None = None,
        mask: Mask | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """The optax transformation that these meta-parameters define.

        ``update(grads, state, params, factors=factors)`` takes the factors of
        :func:`gmn_lopt.value_grad_and_factors`, always those of the whole model, even where ``optax.masked`` or
        ``optax.partition`` hand it only some of the parameters (``UNF`` then takes the features of the others as zero).
        All arithmetic is in float32; updates have the parameters' dtypes. A gradient or factor that is not finite makes
        the update, and from then on the moving averages, not finite, as Adam's; guard with ``optax.apply_if_finite``.

        In ``optax.MultiSteps`` the gradient is the mean over the micro-steps, the factors are the last one's: a sample.
        :func:`gmn_lopt.multi_steps` keeps those of all.

        Args:
            phi: meta-parameters, shaped like those from :meth:`init`.
            learning_rate: a number or an optax schedule, in place of the learned step size. With ``total_steps`` a
                number, the largest one.
            weight_decay: decoupled: ``eta * weight_decay * theta`` is subtracted as well. 0 unless given, but with
                ``total_steps`` that of the step size (:class:`gmn_lopt.optimizers.Horizon`).
            total_steps: the number of steps that there will be, where it is known: step sizes are then those of
                :class:`gmn_lopt.optimizers.Horizon`, unless this optimizer has learned its own for such.
            mask: which parameters have weight decay, as in ``optax.adamw``: a tree of booleans like the parameters, a
                prefix of such, or a function from parameters to one. All, unless given.

        Returns:
            The transformation. Its functions raise :class:`StructureError` where parameters, gradients or factors do
            not match the structure, and ``ValueError`` without ``params`` or without factors that it needs.

        Raises:
            ValueError: if ``phi`` is not shaped like the meta-parameters of these parts; or of ``total_steps``, that it
                is no number of steps, is given beside a schedule, or without the largest step size where the direction
                has no size of its own; or if there is a mask and no weight decay.
        """
        check_meta_parameters(phi, self.template())
        if mask is not None and weight_decay is None and total_steps is None:
            raise ValueError("a mask says which parameters have weight decay: give weight_decay or total_steps")
        step_size, coefficients = self._step_size(phi, learning_rate, total_steps)
        if isinstance(weight_decay, float | int) and weight_decay == 0 and total_steps is None:
            weight_decay = None  # nothing to subtract, and nothing to replace

        def init(params: PyTree) -> LearnedOptimizerState:
            indices = match_leaves(self.structure, params, "parameter")
            # optax's placeholder in tree_map_params, a tree without any leaf, stands for all parameters.
            if not jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode)):
                indices = list(range(len(self.structure.parameters)))
            # New zeros for each part: a state that is donated must not hold a buffer twice. They lie where params do.
            first, second, third = (optax.tree.zeros_like(params, dtype=jnp.float32) for _ in range(3))
            direction = self.direction.init(self.structure, indices, first)
            residual = () if self.residual is None else self.residual.init(self.structure, second)
            sizes = step_size.init(self.structure, third) if step_size is not None else ()
            return LearnedOptimizerState(jnp.zeros((), jnp.int32), direction, residual, sizes)

        def update(
            updates: PyTree,
            state: LearnedOptimizerState,
            params: PyTree | None = None,
            *,
            factors: Any = None,
            **_: Any,
        ) -> tuple[PyTree, LearnedOptimizerState]:
            if params is None:
                raise ValueError("a learned optimizer reads the parameters: call update(grads, state, params, ...)")
            indices = match_leaves(self.structure, params, "parameter")
            if match_leaves(self.structure, updates, "gradient") != indices:
                raise StructureError("the gradients are not those of the parameters: give both for the same leaves")
            read = factors_per_element(self.structure, factors) if self.needs_factors else None
            rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
            decayed = None if mask is None else masked_leaves(mask, params)
            # Everything that may be a traced array is an argument.
            arrays = (phi, coefficients, rate, weight_decay, decayed, updates, state, params, read)
            return leave_to_compiler(functools.partial(advance, indices), (updates, state), *arrays)

        def advance(
            indices: list[int],
            phi: PyTree,
            coefficients: PyTree,
            rate: Any,
            weight_decay: Any,
            decayed: list[Any] | None,
            updates: PyTree,
            state: LearnedOptimizerState,
            params: PyTree,
            factors: Factors | None,
        ) -> tuple[PyTree, LearnedOptimizerState]:
            # The leaves that are handled, in the order of the gradients' tree; a masked tree lacks some.
            grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), updates)
            values = [jnp.asarray(p, jnp.float32) for p in jax.tree.leaves(params)]
            gradient = Gradient(self.structure, indices, grads, factors)

            direction, direction_state = self.direction.update(phi["direction"], gradient, state.direction)
            outputs: Sequence[Any] = [None] * len(values)
            beta, residual_state = None, state.residual
            if self.residual is not None:
                outputs, residual_state = self.residual.update(
                    phi["residual"], gradient, values, state.residual, state.step, self.rule.outputs
                )
                beta = jnp.exp(phi["residual"]["log_beta"])
            sizes = Sizes([rate] * len(values), None, ())
            if step_size is not None:
                sizes = step_size.update(coefficients, state.step_size, gradient, values, state.step, total_steps)
            decays = sizes.decays if weight_decay is None else [weight_decay] * len(values)
            pairs = zip(jax.tree.leaves(direction), outputs, strict=True)
            steps = [self.rule.step(v, out, beta, self.direction.sized) for v, out in pairs]
            if decays is not None and decayed is not None:
                decays = [jnp.where(is_decayed, decay, 0.0) for is_decayed, decay in zip(decayed, decays, strict=True)]
            if decays is not None:
                steps = [d + decay * theta for d, decay, theta in zip(steps, decays, values, strict=True)]
            steps = [-size * d for size, d in zip(sizes.steps, steps, strict=True)]
            size_state = sizes.state
            if isinstance(size_state, StepSizeState):
                size_state = size_state._replace(update=gradient.like_grads(steps))
            typed = [u.astype(jnp.result_type(p)) for u, p in zip(steps, jax.tree.leaves(params))]
            return (
                gradient.like_grads(typed),
                LearnedOptimizerState(optax.safe_increment(state.step), direction_state, residual_state, size_state),
            )

        return optax.GradientTransformationExtraArgs(init, update)

    def _step_size(
        self, phi: PyTree, learning_rate: LearningRate | None, total_steps: int | None
    ) -> tuple[StepSize | None, PyTree]:
        """What sets the size of steps, with its coefficients; None where a learning rate does it alone."""
        if total_steps is None:
            if learning_rate is not None:
                return None, ()
            if self.wants_total_steps:
                raise ValueError("this optimizer was made for a known number of steps: give total_steps")
            return self.step_size, phi["step_size"]
        if callable(learning_rate):
            raise ValueError("give total_steps or a schedule as learning_rate, not both: a schedule knows its steps")
        if self.wants_total_steps:
            step_size, coefficients = self.step_size, phi["step_size"]
        elif learning_rate is None and not self.direction.sized:
            raise ValueError("total_steps needs a learning_rate, its largest one, unless the direction is a sized one")
        else:
            step_size = Horizon()
            coefficients = _logarithms(step_size.coefficients())
        peak = {} if learning_rate is None else {"log_alpha": jnp.log(learning_rate)}
        return step_size, coefficients | peak


def _logarithms(coefficients: Mapping[str, float]) -> dict[str, Float[Array, ""]]:
    """Coefficients as they are learned."""
    return {f"log_{name}": jnp.float32(math.log(start)) for name, start in coefficients.items()}


@functools.lru_cache(maxsize=64)
def _template(lopt: LearnedOptimizer) -> PyTree:
    return jax.eval_shape(lopt.init, jax.random.key(0))
