"""Learned optimizers: update rules whose networks are meta-trained, as optax gradient transformations."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from gmn_lopt.factors.structure import Factors, GradientStructure, StructureError
from gmn_lopt.networks.backbones import DeepSets, UniversalNeuralFunctional
from gmn_lopt.networks.gradmetanet import GradMetaNet, GradMetaNetConfig, init_gradmetanet
from gmn_lopt.networks.initialization import init_weights
from gmn_lopt.optimizers.base_direction import BASES, init_direction, update_direction
from gmn_lopt.optimizers.coefficients import COEFFICIENTS, initial_coefficients
from gmn_lopt.optimizers.directions.denoised_layers import LayerGroup, layer_groups
from gmn_lopt.optimizers.factor_averages import factor_channels, init_factor_averages
from gmn_lopt.optimizers.features.paper import PAPER, FeatureSet
from gmn_lopt.optimizers.features.scale_free import CELO
from gmn_lopt.optimizers.leaves import check_factors, check_meta_parameters, match_leaves
from gmn_lopt.optimizers.output_sites import without_large_outputs
from gmn_lopt.optimizers.rules import RULES, additive_step, normalized_step
from gmn_lopt.optimizers.set_subset import subset
from gmn_lopt.optimizers.step_size import StepSizeState, adapt_step_size, init_step_size, power_law

BACKBONES = ("ds", "unf", "celo", "sgdm")
DEFAULT_GRADMETANET = GradMetaNetConfig()
# Base directions whose size does not follow the gradient's.
SIZED = ("muon", "denoised")

LearningRate = float | Callable[[Array], Any]


class LearnedOptimizerState(NamedTuple):
    """State of a learned optimizer, a pytree of arrays.

    Attributes:
        step: number of steps taken.
        direction: the momentum, shaped like the parameters; with ``base="adam"`` optax's state of Adam, with
            ``base="muon"`` a :class:`gmn_lopt.optimizers.base_direction.MuonState`.
        gradient_averages: moving averages of the gradient: for each parameter an array ``[6, *shape]`` (``celo``:
            ``[4, *shape]``); empty for ``sgdm``.
        factor_averages: moving averages of the activations and of the tangents (at per-element scale), slot by slot
            of the set (or of the subset that is read): arrays ``[factor_decays, S, d]``, None for those that
            GradMetaNet does not read (token ids, large outputs); empty without GradMetaNet.
        step_size: with ``adapt`` a :class:`gmn_lopt.optimizers.step_size.StepSizeState`; empty without.
    """

    step: Int[Array, ""]
    direction: PyTree
    gradient_averages: PyTree
    factor_averages: PyTree
    step_size: PyTree = ()


@dataclass(frozen=True)
class LearnedOptimizer:
    """A learned optimizer for one model: its architecture and that model's gradient structure.

    The additive rule is ``theta' = theta - alpha (v + beta F)``: ``v`` is a base direction, ``F`` the backbone's output
    (arXiv:2507.01649, section 6; Harrison et al. 2022). The normalised rule is
    ``theta' = theta - lr N(v / rms(v) + beta F)`` with ``N(D) = D / rms(D)``, all per tensor, and
    ``F = direction x exp(0.001 magnitude)`` of two outputs of the backbone: the rule of Celo2 (arXiv:2602.19142) with a
    base direction, from which it starts. Where the base direction has a size of its own (``"muon"``, ``"denoised"``),
    the step keeps it: ``N(D) = rms(v) D / rms(D)``. The coefficients (``alpha``, ``beta``, those of the base) are
    meta-learned with the networks' weights.

    Attributes:
        structure: the structure of the model, from :func:`gmn_lopt.analyze`.
        backbone: ``"ds"`` (the paper's per-parameter network and features), ``"unf"`` (the same with a last layer over
            all parameters, :class:`UniversalNeuralFunctional`; its meta-parameters belong to one
            model, of any widths), ``"celo"`` (the network of ``ds`` on scale-free features without a clock,
            :mod:`gmn_lopt.optimizers.features.scale_free`), or ``"sgdm"`` for no network at all: then
            GradMetaNet is left out whatever ``gradmetanet`` says, and the rule is the base with learned coefficients.
        gradmetanet: architecture of the GradMetaNet whose output joins the features; None: without.
        base: ``"momentum"``, ``"adam"``, ``"muon"`` or ``"denoised"``, see
            :func:`gmn_lopt.optimizers.base_direction.update_direction`.
        width: width of the backbone's hidden layers.
        hidden_layers: number of the backbone's hidden layers, all of them per parameter.
        rule: ``"additive"`` or ``"normalized"``.
        orthogonalize: in the normalised rule, the ``N(D)`` of a kernel is ``D`` orthogonalised, as in Muon
            (:func:`gmn_lopt.factors.matrices.orthogonalize`), and that of other parameters is multiplied by the learned
            ``gamma``.
        gate: whether a second output ``m`` of the backbone multiplies the step, entry by entry: ``exp(0.5 m)`` times
            ``v`` in the additive rule, times ``N(D)`` in the normalised one. With the clock of ``ds`` that is a learned
            schedule.
        decay: whether ``alpha``, or the normalised rule's ``lr`` where the user gives none, falls with the number ``t``
            of steps taken, as ``(1 + t / tau)^-power`` with learned ``tau`` and ``power``. It needs no horizon.
        adapt: whether the same step size is adapted while training, by whether gradients agree with the steps before
            them (:mod:`gmn_lopt.optimizers.step_size`), with learned ``gain`` and ``overshoot``.
        bound: in the additive rule, the largest ``beta rms(F) / rms(v)``, per tensor; beyond, ``F`` is scaled down.
            None: no bound.
        learning_rate: ``lr`` of the normalised rule where the user gives none.
        output_scale: what the backbone's last layer is multiplied by at initialisation; with 0 the untrained optimizer
            is its base.
    """

    structure: GradientStructure
    backbone: str = "ds"
    gradmetanet: GradMetaNetConfig | None = DEFAULT_GRADMETANET
    base: str = "momentum"
    width: int = 32
    hidden_layers: int = 3
    rule: str = "additive"
    orthogonalize: bool = False
    gate: bool = False
    decay: bool = False
    adapt: bool = False
    bound: float | None = None
    learning_rate: float = 1e-3
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("backbone", BACKBONES), ("base", BASES), ("rule", RULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        for name in ("width", "hidden_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name in ("bound", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, not {value!r}")
        normalized = self.rule == "normalized"
        if (self.orthogonalize and not normalized) or (self.bound is not None and normalized):
            raise ValueError("orthogonalize belongs to the normalized rule, bound to the additive one")
        if self.orthogonalize and self.base in SIZED:
            raise ValueError(f"base={self.base!r} is orthogonal as it is; use orthogonalize with base='momentum'")
        if self.backbone == "sgdm":
            object.__setattr__(self, "gradmetanet", None)

    @property
    def needs_factors(self) -> bool:
        """Whether ``update`` has to be given ``factors``: with GradMetaNet or the denoised base, if there are any."""
        return self._reads_set or (self.base == "denoised" and bool(self.structure.layers))

    @property
    def _reads_set(self) -> bool:
        return self.gradmetanet is not None and any(p.sites for p in self._read.parameters)

    @property
    def _read(self) -> GradientStructure:
        """The structure with the sites that GradMetaNet reads."""
        assert self.gradmetanet is not None
        return without_large_outputs(self.structure, self.gradmetanet.max_output_size)

    def init(self, key: jax.Array) -> PyTree:
        """Draw meta-parameters: float32 arrays whose shapes do not depend on the structure (but see ``unf``).

        Args:
            key: a random key.

        Returns:
            A dictionary with ``backbone`` and ``gradmetanet``, and ``log_NAME`` for every coefficient (see
            :mod:`gmn_lopt.optimizers.coefficients`), as far as the architecture has them.
        """
        key_backbone, key_gmn = jax.random.split(key)
        start = initial_coefficients(
            self.base,
            normalized=self.rule == "normalized",
            orthogonalize=self.orthogonalize,
            decay=self.decay,
            adapt=self.adapt,
            network=self.backbone != "sgdm",
        )
        phi: dict[str, Any] = {f"log_{name}": jnp.log(jnp.float32(value)) for name, value in start.items()}
        if self.backbone != "sgdm":
            module, one = self._backbone(range(len(self.structure.parameters))), jax.ShapeDtypeStruct
            kinds = (module.parameter_channels, module.extra_channels)
            features, extra = ([one((p.size, n), jnp.float32) for p in self.structure.parameters] for n in kinds)
            time = one((module.time_channels,), jnp.float32)
            weights = init_weights(module.init, key_backbone, features, extra, time)
            last = jax.tree.map(lambda w: self.output_scale * w, weights[module.last_layer])
            phi["backbone"] = weights | {module.last_layer: last}
        if self.gradmetanet is not None:
            phi["gradmetanet"] = init_gradmetanet(self._gradmetanet, key_gmn)
        return phi

    def template(self) -> PyTree:
        """The shapes and dtypes of the meta-parameters, as :meth:`init` draws them."""
        return _template(self)

    def scalars(self, phi: PyTree) -> dict[str, Float[Array, ""]]:
        """The rule's coefficients, for monitoring: those that it has of ``alpha``, ``beta``, ``gamma``, ``tau``,
        ``power``, ``gain``, ``overshoot`` and ``mu``."""
        values = {n: jnp.exp(phi[f"log_{n}"]) for n in COEFFICIENTS if f"log_{n}" in phi}
        if "one_minus_mu" in values:
            values["mu"] = 1.0 - values.pop("one_minus_mu")
        return values

    def optimizer(
        self, phi: PyTree, learning_rate: LearningRate | None = None, weight_decay: float = 0.0
    ) -> optax.GradientTransformationExtraArgs:
        """The optax transformation that these meta-parameters define.

        ``update(grads, state, params, factors=factors)`` takes the factors of
        :func:`gmn_lopt.value_grad_and_factors`, always those of the whole model, even where ``optax.masked`` or
        ``optax.partition`` hand it only some of the parameters (``unf`` then takes the features of the others as zero);
        without GradMetaNet they are ignored. All arithmetic is
        in float32; updates have the parameters' dtypes. A gradient or factor that is not finite makes the update, and
        from then on the moving averages, not finite, as Adam's; guard with ``optax.apply_if_finite``.

        In ``optax.MultiSteps`` the gradient is the mean over the micro-steps and the factors are those of the last
        micro-step: a sample of the set that the gradient is the mean of.

        Args:
            phi: meta-parameters, shaped like those from :meth:`init`.
            learning_rate: ``lr`` of the normalised rule, a number or an optax schedule, used as it is; default:
                :attr:`learning_rate`, with ``decay`` and ``adapt`` if set.
            weight_decay: decoupled weight decay of the normalised rule: ``lr * weight_decay * theta`` is subtracted as
                well.

        Returns:
            The transformation. Its functions raise :class:`StructureError` where parameters, gradients or factors do
            not match the structure, and ``ValueError`` without ``params`` or without factors that it needs.

        Raises:
            ValueError: if ``phi`` is not shaped like this architecture's meta-parameters, or a learning rate or weight
                decay is given to the additive rule, which has learned its own.
        """
        if self.rule != "normalized" and not (
            learning_rate is None and isinstance(weight_decay, float | int) and weight_decay == 0
        ):
            raise ValueError(
                "this optimizer has learned its own learning rate and takes neither learning_rate nor weight_decay; "
                "chain it with optax.scale or optax.add_decayed_weights, or use one with rule='normalized'"
            )
        check_meta_parameters(phi, self.template())

        def init(params: PyTree) -> LearnedOptimizerState:
            indices = match_leaves(self.structure, params, "parameter")
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
            parameters = [self.structure.parameters[i] for i in indices]
            # optax's placeholder in tree_map_params, a tree without any leaf, stands for all parameters.
            present = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
            handled = indices if present else range(len(self.structure.parameters))
            direction = init_direction(self.base, parameters, zeros, self.denoised_groups(handled))
            averages: PyTree = ()
            if self.backbone != "sgdm":
                averages = jax.tree.map(lambda p: jnp.zeros((self._features.averages, *p.shape), jnp.float32), params)
            step_size = init_step_size(zeros) if self.adapt and learning_rate is None else ()
            step = jnp.zeros((), jnp.int32)
            return LearnedOptimizerState(step, direction, averages, self._init_factor_averages(), step_size)

        def update(
            updates: PyTree,
            state: LearnedOptimizerState,
            params: PyTree | None = None,
            *,
            factors: Any = None,
            **_: Any,
        ) -> tuple[PyTree, LearnedOptimizerState]:
            if params is None:
                raise ValueError(
                    "You are using a transformation that requires the current value of parameters, but you are not "
                    "passing `params` when calling `update`."
                )
            rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
            return self._update(phi, updates, state, params, factors, rate, weight_decay)

        return optax.GradientTransformationExtraArgs(init, update)

    @property
    def tied_leaves(self) -> tuple[tuple[int, ...], ...] | None:
        """For ``unf`` what the meta-parameters belong to: the spaces of each leaf, numbered as they come; else None."""
        if self.backbone != "unf":
            return None
        numbers: dict[int, int] = {}
        return tuple(tuple(numbers.setdefault(s, len(numbers)) for s in p.spaces) for p in self.structure.parameters)

    def _backbone(self, indices: Sequence[int]) -> DeepSets | UniversalNeuralFunctional:
        extra = 0 if self.gradmetanet is None else self.gradmetanet.out_features
        outputs = 2 if self.gate or self.rule == "normalized" else 1
        channels = self._features.channels, extra, self._features.time_channels
        sizes = (*channels, self.width, self.hidden_layers, outputs)
        if self.backbone == "unf":
            return UniversalNeuralFunctional(self.structure.parameters, tuple(indices), *sizes)
        return DeepSets(*sizes)

    @property
    def _features(self) -> FeatureSet:
        return CELO if self.backbone == "celo" else PAPER

    @property
    def _gradmetanet(self) -> GradMetaNet:
        assert self.gradmetanet is not None
        return GradMetaNet(self._read, self.gradmetanet, channels=1 + len(self.gradmetanet.factor_decays))

    def _init_factor_averages(self) -> PyTree:
        if not self._reads_set:
            return ()
        assert self.gradmetanet is not None
        return init_factor_averages(self._read, self.gradmetanet.max_set_size, self.gradmetanet.factor_decays)

    def _update(
        self,
        phi: PyTree,
        updates: PyTree,
        state: LearnedOptimizerState,
        params: PyTree,
        factors: Any,
        learning_rate: float | Array | None,
        weight_decay: Any,
    ) -> tuple[PyTree, LearnedOptimizerState]:
        indices = match_leaves(self.structure, params, "parameter")
        if match_leaves(self.structure, updates, "gradient") != indices:
            raise StructureError("the gradients are not those of the parameters: give both for the same leaves")
        # The leaves that are handled, in the order of the gradients' tree; a masked tree lacks some.
        parameters = [self.structure.parameters[i] for i in indices]
        treedef = jax.tree.structure(updates)
        grads = [jnp.asarray(g, jnp.float32) for g in jax.tree.leaves(updates)]
        values = [jnp.asarray(p, jnp.float32) for p in jax.tree.leaves(params)]

        gradient_tree = jax.tree.unflatten(treedef, grads)
        if self.needs_factors:
            factors = self._per_element(factors)
        direction, direction_state = update_direction(
            *(self.base, parameters, phi, gradient_tree, state.direction),
            *(self.denoised_groups(indices), factors if self.needs_factors else None),
        )
        base = jax.tree.leaves(direction)
        gradient_averages, factor_averages = state.gradient_averages, state.factor_averages
        outputs: Sequence[Any] = [None] * len(base)
        if self.backbone != "sgdm":
            averages = [self._features.advance(a, g) for a, g in zip(jax.tree.leaves(gradient_averages), grads)]
            gradient_averages = jax.tree.unflatten(treedef, averages)
            extra: Sequence[Any] = [None] * len(grads)
            if self._reads_set:
                assert self.gradmetanet is not None
                read = subset(factors, self.gradmetanet.max_set_size, state.step)
                channels, factor_averages = factor_channels(factor_averages, read, self.gradmetanet.factor_decays)
                extra = self._extra_features(phi, channels, indices, values)
            features = [self._features.of_entries(*leaf, state.step) for leaf in zip(values, grads, averages)]
            if features:
                time = self._features.of_time(state.step)
                outputs = self._backbone(indices).apply({"params": phi["backbone"]}, features, extra, time)
        sizes, adapted = self._step_sizes(phi, state, gradient_tree, learning_rate)
        beta, gamma = (jnp.exp(phi[name]) if name in phi else None for name in ("log_beta", "log_gamma"))
        if self.rule == "additive":
            if self.backbone != "sgdm":
                assert beta is not None
                base = [additive_step(v, out, beta, self.gate, self.bound) for v, out in zip(base, outputs)]
            steps = [size * d for size, d in zip(sizes, base)]
        else:
            gamma = gamma if self.orthogonalize else None
            sized, leaves = self.base in SIZED, zip(parameters, base, outputs)
            steps = [normalized_step(p, v, out, beta, gamma, self.gate, sized) for p, v, out in leaves]
            steps = [size * (d + weight_decay * theta) for size, d, theta in zip(sizes, steps, values)]
        if isinstance(adapted, StepSizeState):
            adapted = adapted._replace(update=jax.tree.unflatten(treedef, [-d for d in steps]))
        steps = [(-d).astype(jnp.result_type(p)) for d, p in zip(steps, jax.tree.leaves(params))]
        step = optax.safe_increment(state.step)
        return (
            jax.tree.unflatten(treedef, steps),
            LearnedOptimizerState(step, direction_state, gradient_averages, factor_averages, adapted),
        )

    def _step_sizes(
        self, phi: PyTree, state: LearnedOptimizerState, grads: PyTree, learning_rate: float | Array | None
    ) -> tuple[list[Any], PyTree]:
        """The step size of each leaf, and the state of its feedback (its update still that of the step before)."""
        count = len(jax.tree.leaves(grads))
        if learning_rate is not None:
            return [learning_rate] * count, ()
        first = jnp.exp(phi["log_alpha"]) if self.rule == "additive" else self.learning_rate
        scheduled = power_law(phi, state.step) if self.decay else 1.0
        if not self.adapt:
            return [first * scheduled] * count, ()
        adapted = adapt_step_size(phi, state.step_size, grads, state.step, scheduled)
        return list(first * scheduled * jnp.exp(adapted.log_factor)), adapted

    def denoised_groups(self, indices: Sequence[int]) -> tuple[LayerGroup, ...]:
        """The layers that take the denoised step, where ``indices`` are the parameters handled; else none."""
        return layer_groups(self.structure, indices) if self.base == "denoised" else ()

    def _per_element(self, factors: Any) -> Factors:
        """The factors in float32, the tangents at per-element scale."""
        check_factors(self.structure, factors)
        ids = self.structure.token_ids
        return Factors(
            tuple(a if i in ids else jnp.asarray(a, jnp.float32) for i, a in enumerate(factors.activations)),
            tuple(g.shape[0] * jnp.asarray(g, jnp.float32) for g in factors.tangents),
        )

    def _extra_features(
        self, phi: PyTree, channels: Factors, indices: Sequence[int], values: Sequence[jax.Array]
    ) -> Sequence[Float[Array, "_ extra"] | None]:
        """GradMetaNet's features of the leaves that are handled."""
        by_index: list[Any] = [jnp.zeros(p.shape) for p in self.structure.parameters]
        for index, value in zip(indices, values):
            by_index[index] = value
        outputs: Any = self._gradmetanet.apply({"params": phi["gradmetanet"]}, channels, by_index)
        chosen = [outputs[i] for i in indices]
        return [None if x is None else x.reshape(-1, x.shape[-1]) for x in chosen]


@functools.lru_cache(maxsize=64)
def _template(lopt: LearnedOptimizer) -> PyTree:
    return jax.eval_shape(lopt.init, jax.random.key(0))
