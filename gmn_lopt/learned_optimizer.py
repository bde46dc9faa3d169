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

from gmn_lopt import celo_features
from gmn_lopt.backbones import DeepSets
from gmn_lopt.base_direction import BASES, init_direction, update_direction
from gmn_lopt.factor_averages import factor_channels, init_factor_averages
from gmn_lopt.features import (
    DECAYS,
    PARAMETER_CHANNELS,
    TIME_CHANNELS,
    parameter_features,
    time_features,
    update_averages,
)
from gmn_lopt.gradmetanet import GradMetaNet, GradMetaNetConfig, init_gradmetanet
from gmn_lopt.initialization import init_weights
from gmn_lopt.matrices import is_kernel, orthogonalize
from gmn_lopt.set_subset import subset
from gmn_lopt.structure import Factors, GradientStructure, Parameter, StructureError
from gmn_lopt.whitening import WhitenedLayer, whitened_layers

BACKBONES = ("ds", "celo", "sgdm")
RULES = ("additive", "normalized")
DEFAULT_GRADMETANET = GradMetaNetConfig()
# What the coefficients start at. Adam's direction has entries of about one where a gradient's are small, so its own
# learning rate is small; beta is larger by as much, so that the network's part has the same step size in both.
INITIAL = {
    "momentum": {"alpha": 0.1, "beta": 1e-3, "one_minus_mu": 0.1},
    "adam": {"alpha": 1e-3, "beta": 0.1},
    "muon": {"alpha": 0.03, "beta": 0.01, "gamma": 0.3},
    "whitened": {"alpha": 0.02, "beta": 0.01, "gamma": 0.3},
}
NORMALIZED_BETA = 0.1
COEFFICIENTS = ("alpha", "beta", "gamma", "one_minus_mu")
# How much an output of one of the backbone's second output changes the logarithm of a step.
MAGNITUDE_SCALE, GATE_SCALE = 0.001, 0.5
TINY = 1e-30

LearningRate = float | Callable[[Array], Any]


class LearnedOptimizerState(NamedTuple):
    """State of a learned optimizer, a pytree of arrays.

    Attributes:
        step: number of steps taken.
        direction: the momentum, shaped like the parameters; with ``base="adam"`` optax's state of Adam, with
            ``base="muon"`` a :class:`gmn_lopt.base_direction.MuonState`.
        gradient_averages: moving averages of the gradient: for each parameter an array ``[6, *shape]`` (``celo``:
            ``[4, *shape]``); empty for ``sgdm``.
        factor_averages: moving averages of the activations and of the tangents (at per-element scale), slot by slot
            of the set (or of the subset that is read): arrays ``[6, S, d]``, None for token ids; empty without
            GradMetaNet.
    """

    step: Int[Array, ""]
    direction: PyTree
    gradient_averages: PyTree
    factor_averages: PyTree


@dataclass(frozen=True)
class LearnedOptimizer:
    """A learned optimizer for one model: its architecture and that model's gradient structure.

    The additive rule is ``theta' = theta - alpha (v + beta F)``: ``v`` is a base direction, ``F`` the backbone's output
    (arXiv:2507.01649, section 6; Harrison et al. 2022). The normalised rule is
    ``theta' = theta - lr N(v / rms(v) + beta F)`` with ``N(D) = D / rms(D)``, all per tensor, and
    ``F = direction x exp(0.001 magnitude)`` of two outputs of the backbone: the rule of Celo2 (arXiv:2602.19142) with a
    base direction, from which it starts. The coefficients (``alpha``, ``beta``, those of the base) are meta-learned
    with the networks' weights.

    Attributes:
        structure: the structure of the model, from :func:`gmn_lopt.analyze`.
        backbone: ``"ds"`` (the paper's per-parameter network and features), ``"celo"`` (the same network on scale-free
            features without a clock, :mod:`gmn_lopt.celo_features`), or ``"sgdm"`` for no network at all: then
            GradMetaNet is left out whatever ``gradmetanet`` says, and the rule is the base with learned coefficients.
        gradmetanet: architecture of the GradMetaNet whose output joins the features; None: without.
        base: ``"momentum"``, ``"adam"``, ``"muon"`` or ``"whitened"``, see
            :func:`gmn_lopt.base_direction.update_direction`.
        width: width of the backbone's hidden layers.
        hidden_layers: number of the backbone's hidden layers.
        rule: ``"additive"`` or ``"normalized"``.
        orthogonalize: in the normalised rule, the ``N(D)`` of a kernel is ``D`` orthogonalised, as in Muon
            (:func:`gmn_lopt.matrices.orthogonalize`), and that of other parameters is multiplied by the learned
            ``gamma``.
        gate: whether a second output ``m`` of the backbone multiplies the step, entry by entry: ``exp(0.5 m)`` times
            ``v`` in the additive rule, times ``N(D)`` in the normalised one. With the clock of ``ds`` that is a learned
            schedule.
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
        if self.base in ("muon", "whitened") and normalized:
            raise ValueError("the normalized rule with orthogonalize=True is Muon's; use it with base='momentum'")
        if self.backbone == "sgdm":
            object.__setattr__(self, "gradmetanet", None)

    @property
    def needs_factors(self) -> bool:
        """Whether ``update`` has to be given ``factors``: with GradMetaNet or the whitened base, if there are any."""
        return self._reads_set or (self.base == "whitened" and bool(self.structure.layers))

    @property
    def _reads_set(self) -> bool:
        return self.gradmetanet is not None and any(p.sites for p in self.structure.parameters)

    def init(self, key: jax.Array) -> PyTree:
        """Draw meta-parameters: float32 arrays whose shapes do not depend on the structure.

        Args:
            key: a random key.

        Returns:
            A dictionary with those that the architecture has of ``log_alpha``, ``log_beta``, ``log_gamma``,
            ``log_one_minus_mu``, ``backbone`` and ``gradmetanet``.
        """
        key_backbone, key_gmn = jax.random.split(key)
        start = dict(INITIAL[self.base])
        if self.rule == "normalized":
            del start["alpha"]
            start["beta"] = NORMALIZED_BETA
            if self.orthogonalize:
                start["gamma"] = INITIAL["muon"]["gamma"]
        if self.backbone == "sgdm":
            del start["beta"]
        phi: dict[str, Any] = {f"log_{name}": jnp.log(jnp.float32(value)) for name, value in start.items()}
        if self.backbone != "sgdm":
            module, one = self._backbone, lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
            inputs = [one(1, module.parameter_channels)], [one(1, module.extra_channels)], one(module.time_channels)
            weights = init_weights(module.init, key_backbone, *inputs)
            last = f"kernel_{self.hidden_layers}"
            phi["backbone"] = weights | {last: self.output_scale * weights[last]}
        if self.gradmetanet is not None:
            phi["gradmetanet"] = init_gradmetanet(self._gradmetanet, key_gmn)
        return phi

    def template(self) -> PyTree:
        """The shapes and dtypes of the meta-parameters, as :meth:`init` draws them."""
        return _template(self)

    def scalars(self, phi: PyTree) -> dict[str, Float[Array, ""]]:
        """The rule's coefficients, for monitoring: those that it has of ``alpha``, ``beta``, ``gamma`` and ``mu``."""
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
        ``optax.partition`` hand it only some of the parameters; without GradMetaNet they are ignored. All arithmetic is
        in float32; updates have the parameters' dtypes. A gradient or factor that is not finite makes the update, and
        from then on the moving averages, not finite, as Adam's; guard with ``optax.apply_if_finite``.

        In ``optax.MultiSteps`` the gradient is the mean over the micro-steps and the factors are those of the last
        micro-step: a sample of the set that the gradient is the mean of.

        Args:
            phi: meta-parameters, shaped like those from :meth:`init`.
            learning_rate: ``lr`` of the normalised rule, a number or an optax schedule; default: :attr:`learning_rate`.
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
        rate = self.learning_rate if learning_rate is None else learning_rate
        _check_meta_parameters(phi, self.template())

        def init(params: PyTree) -> LearnedOptimizerState:
            indices = _match(self.structure, params, "parameter")
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
            parameters = [self.structure.parameters[i] for i in indices]
            direction = init_direction(self.base, parameters, zeros, self._whitened(indices))
            averages: PyTree = ()
            if self.backbone != "sgdm":
                count = len(DECAYS) if self.backbone == "ds" else celo_features.AVERAGES
                averages = jax.tree.map(lambda p: jnp.zeros((count, *p.shape), jnp.float32), params)
            return LearnedOptimizerState(jnp.zeros((), jnp.int32), direction, averages, self._init_factor_averages())

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
            lr = rate(state.step) if callable(rate) else rate
            return self._update(phi, updates, state, params, factors, lr, weight_decay)

        return optax.GradientTransformationExtraArgs(init, update)

    @property
    def _backbone(self) -> DeepSets:
        extra = 0 if self.gradmetanet is None else self.gradmetanet.out_features
        own, time = (PARAMETER_CHANNELS, TIME_CHANNELS) if self.backbone == "ds" else (celo_features.CHANNELS, 0)
        outputs = 2 if self.gate or self.rule == "normalized" else 1
        return DeepSets(own, extra, time, self.width, self.hidden_layers, outputs)

    @property
    def _gradmetanet(self) -> GradMetaNet:
        assert self.gradmetanet is not None
        return GradMetaNet(self.structure, self.gradmetanet, channels=1 + len(DECAYS))

    def _init_factor_averages(self) -> PyTree:
        if not self._reads_set:
            return ()
        assert self.gradmetanet is not None
        return init_factor_averages(self.structure, self.gradmetanet.max_set_size)

    def _update(
        self,
        phi: PyTree,
        updates: PyTree,
        state: LearnedOptimizerState,
        params: PyTree,
        factors: Any,
        learning_rate: Any,
        weight_decay: Any,
    ) -> tuple[PyTree, LearnedOptimizerState]:
        indices = _match(self.structure, params, "parameter")
        if _match(self.structure, updates, "gradient") != indices:
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
            *(self._whitened(indices), factors.activations if self.needs_factors else ()),
        )
        base = jax.tree.leaves(direction)
        gradient_averages, factor_averages = state.gradient_averages, state.factor_averages
        outputs: Sequence[Any] = [None] * len(base)
        if self.backbone != "sgdm":
            advance = update_averages if self.backbone == "ds" else celo_features.update_celo_averages
            averages = [advance(a, g) for a, g in zip(jax.tree.leaves(gradient_averages), grads)]
            gradient_averages = jax.tree.unflatten(treedef, averages)
            extra: Sequence[Any] = [None] * len(grads)
            if self._reads_set:
                assert self.gradmetanet is not None
                read = subset(factors, self.gradmetanet.max_set_size, state.step)
                channels, factor_averages = factor_channels(factor_averages, read)
                extra = self._extra_features(phi, channels, indices, values)
            features = [self._features(*leaf, state.step) for leaf in zip(values, grads, averages)]
            if features:
                time = time_features(state.step) if self.backbone == "ds" else jnp.zeros(0)
                outputs = self._backbone.apply({"params": phi["backbone"]}, features, extra, time)
        if self.rule == "additive":
            alpha = jnp.exp(phi["log_alpha"])
            steps = [alpha * self._additive(phi, v, out) for v, out in zip(base, outputs)]
        else:
            steps = [self._normalized(phi, p, v, out) for p, v, out in zip(parameters, base, outputs)]
            steps = [learning_rate * (d + weight_decay * theta) for d, theta in zip(steps, values)]
        steps = [(-d).astype(jnp.result_type(p)) for d, p in zip(steps, jax.tree.leaves(params))]
        step = optax.safe_increment(state.step)
        return (
            jax.tree.unflatten(treedef, steps),
            LearnedOptimizerState(step, direction_state, gradient_averages, factor_averages),
        )

    def _features(self, value: jax.Array, grad: jax.Array, averages: jax.Array, step: jax.Array) -> jax.Array:
        if self.backbone == "ds":
            return parameter_features(value, grad, averages)
        return celo_features.celo_features(value, grad, averages, step)

    def _additive(self, phi: PyTree, v: jax.Array, outputs: jax.Array | None) -> jax.Array:
        """``v + beta F`` of one leaf, with its gate and bound."""
        if outputs is None:
            return v
        learned = jnp.exp(phi["log_beta"]) * outputs[:, 0].reshape(v.shape)
        if self.bound is not None:
            ratio = self.bound * _rms(v) / _rms(learned)
            learned = jnp.minimum(1.0, ratio) * learned
        return self._gated(v, outputs) + learned

    def _normalized(self, phi: PyTree, parameter: Parameter, v: jax.Array, outputs: jax.Array | None) -> jax.Array:
        """``N(v / rms(v) + beta F)`` of one leaf, with its gate."""
        d = v / _rms(v)
        if outputs is not None:
            learned = outputs[:, 0] if self.gate else outputs[:, 0] * jnp.exp(MAGNITUDE_SCALE * outputs[:, 1])
            d = d + jnp.exp(phi["log_beta"]) * learned.reshape(v.shape)
        if self.orthogonalize and is_kernel(parameter):
            d = orthogonalize(parameter, d)
        else:
            d = d / _rms(d) * (jnp.exp(phi["log_gamma"]) if self.orthogonalize else 1.0)
        return d if outputs is None else self._gated(d, outputs)

    def _gated(self, d: jax.Array, outputs: jax.Array) -> jax.Array:
        return d * jnp.exp(GATE_SCALE * outputs[:, 1]).reshape(d.shape) if self.gate else d

    def _whitened(self, indices: Sequence[int]) -> tuple[WhitenedLayer, ...]:
        return whitened_layers(self.structure, indices) if self.base == "whitened" else ()

    def _per_element(self, factors: Any) -> Factors:
        """The factors in float32, the tangents at per-element scale."""
        _check_factors(self.structure, factors)
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


def _check_meta_parameters(phi: PyTree, template: PyTree) -> None:
    given, expected = (
        {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (phi, template)
    )
    for name in [*expected, *given]:
        if given.get(name) == expected.get(name):
            continue
        if name not in given:
            problem = f"phi lacks {name}"
        elif name not in expected:
            problem = f"phi holds {name}, which this architecture does not have"
        else:
            problem = f"phi{name} has shape {given[name]}, but {expected[name]} in this architecture"
        raise ValueError(f"{problem}: use meta-parameters from the init of the same LearnedOptimizer")


def _match(structure: GradientStructure, tree: PyTree, what: str) -> list[int]:
    """The index in ``structure.parameters`` of each leaf of ``tree``, some of which optax may have masked.

    Raises:
        StructureError: if a leaf is not one of the structure's, has another shape, or is missing without a mask.
    """
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    index_of = {p.name: i for i, p in enumerate(structure.parameters)}
    indices, masked = [], []
    for path, leaf in jax.tree.flatten_with_path(tree, is_leaf=is_masked)[0]:
        name = jax.tree_util.keystr(path)
        if is_masked(leaf):
            masked.append(name)
            continue
        if name not in index_of:
            raise StructureError(
                f"{what} {name or '(the root)'} is not in the analysed model, which has "
                f"{', '.join(index_of)}: analyse the model that is being trained"
            )
        expected = structure.parameters[index_of[name]].shape
        if jnp.shape(leaf) != expected:
            raise StructureError(
                f"{what} {name} has shape {jnp.shape(leaf)}, but {expected} in the analysed model: "
                "analyse the model that is being trained"
            )
        indices.append(index_of[name])
    missing = [n for n in index_of if index_of[n] not in set(indices) and not any(n.startswith(m) for m in masked)]
    # A tree without any leaf is optax's placeholder in tree_map_params, or everything is masked.
    if missing and (indices or masked):
        raise StructureError(f"{what} {missing[0]} of the analysed model is missing: analyse the model being trained")
    return indices


def _rms(x: jax.Array) -> jax.Array:
    """Root mean square over a tensor."""
    return jnp.sqrt(jnp.mean(x**2) + TINY)


def _check_factors(structure: GradientStructure, factors: Any) -> None:
    if factors is None:
        raise ValueError(
            "this learned optimizer reads the factors of the gradient: compute them with "
            "value, grads, factors = gmn_lopt.value_grad_and_factors(loss_fn)(params, *args) "
            "and call update(grads, state, params, factors=factors)"
        )
    if not isinstance(factors, Factors):
        raise StructureError(f"factors must be gmn_lopt's Factors, not {type(factors).__name__}")
    structure.check_factors(factors)
