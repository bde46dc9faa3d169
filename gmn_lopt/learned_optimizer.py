"""Learned optimizers: update rules whose networks are meta-trained, as optax gradient transformations."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from gmn_lopt.backbones import DeepSets
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
from gmn_lopt.structure import Factors, GradientStructure, StructureError

BACKBONES = ("ds", "sgdm")
BASES = ("momentum", "adam")
DEFAULT_GRADMETANET = GradMetaNetConfig()
# What alpha, beta and mu start at. Adam's direction has entries of about one where a gradient's are small, so its own
# learning rate is small; beta is larger by as much, so that the network's part has the same step size in both.
INITIAL = {
    "momentum": {"alpha": 0.1, "beta": 1e-3, "one_minus_mu": 0.1},
    "adam": {"alpha": 1e-3, "beta": 0.1},
}


class LearnedOptimizerState(NamedTuple):
    """State of a learned optimizer, a pytree of arrays.

    Attributes:
        step: number of steps taken.
        direction: the momentum, shaped like the parameters; with ``base="adam"`` optax's state of Adam.
        gradient_averages: moving averages of the gradient: for each parameter an array ``[6, *shape]``; empty for
            ``sgdm``.
        factor_averages: moving averages of the activations and of the tangents (at per-element scale), slot by slot
            of the set: arrays ``[6, S, d]``; empty without GradMetaNet.
    """

    step: Int[Array, ""]
    direction: PyTree
    gradient_averages: PyTree
    factor_averages: PyTree


@dataclass(frozen=True)
class LearnedOptimizer:
    """A learned optimizer for one model: its architecture and that model's gradient structure.

    The update is ``theta' = theta - alpha (v + beta F)``: ``v`` is momentum, ``v <- mu v + (1 - mu) grad``, or Adam's
    direction, and ``F`` the backbone's output (arXiv:2507.01649, section 6; Harrison et al. 2022). ``alpha``, ``beta``
    and ``mu`` are meta-learned with the networks' weights.

    Attributes:
        structure: the structure of the model, from :func:`gmn_lopt.analyze`.
        backbone: ``"ds"``, or ``"sgdm"`` for no network at all: then GradMetaNet is left out whatever ``gradmetanet``
            says, and the rule is momentum (or Adam) with learned coefficients.
        gradmetanet: architecture of the GradMetaNet whose output joins the features; None: without.
        base: ``"momentum"`` or ``"adam"`` (decays 0.9 and 0.999, bias-corrected; ``alpha`` is then its learning rate).
        width: width of the backbone's hidden layers.
    """

    structure: GradientStructure
    backbone: str = "ds"
    gradmetanet: GradMetaNetConfig | None = DEFAULT_GRADMETANET
    base: str = "momentum"
    width: int = 32

    def __post_init__(self) -> None:
        for name, known in (("backbone", BACKBONES), ("base", BASES)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise ValueError(f"width must be a whole number of at least 1, not {self.width!r}")
        if self.backbone == "sgdm":
            object.__setattr__(self, "gradmetanet", None)

    @property
    def needs_factors(self) -> bool:
        """Whether ``update`` has to be given ``factors``: with GradMetaNet, unless no parameter has a site."""
        return self.gradmetanet is not None and any(p.sites for p in self.structure.parameters)

    def init(self, key: jax.Array) -> PyTree:
        """Draw meta-parameters: float32 arrays whose shapes do not depend on the structure.

        Args:
            key: a random key.

        Returns:
            A dictionary with ``log_alpha``, and, where the rule has them, ``log_one_minus_mu``, ``log_beta``,
            ``backbone`` and ``gradmetanet``.
        """
        key_backbone, key_gmn = jax.random.split(key)
        start = dict(INITIAL[self.base])
        if self.backbone == "sgdm":
            del start["beta"]
        phi: dict[str, Any] = {f"log_{name}": jnp.log(jnp.float32(value)) for name, value in start.items()}
        if self.backbone == "ds":
            module, one = self._backbone, lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
            inputs = [one(1, PARAMETER_CHANNELS)], [one(1, module.extra_channels)], one(TIME_CHANNELS)
            phi["backbone"] = init_weights(module.init, key_backbone, *inputs)
        if self.gradmetanet is not None:
            phi["gradmetanet"] = init_gradmetanet(self._gradmetanet, key_gmn)
        return phi

    def template(self) -> PyTree:
        """The shapes and dtypes of the meta-parameters, as :meth:`init` draws them."""
        return _template(self)

    def scalars(self, phi: PyTree) -> dict[str, Float[Array, ""]]:
        """The rule's coefficients, for monitoring: ``alpha``, and ``beta`` and ``mu`` where the rule has them."""
        values = {n: jnp.exp(phi[f"log_{n}"]) for n in ("alpha", "beta", "one_minus_mu") if f"log_{n}" in phi}
        if "one_minus_mu" in values:
            values["mu"] = 1.0 - values.pop("one_minus_mu")
        return values

    def optimizer(self, phi: PyTree) -> optax.GradientTransformationExtraArgs:
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

        Returns:
            The transformation. Its functions raise :class:`StructureError` where parameters, gradients or factors do
            not match the structure, and ``ValueError`` without ``params`` or without factors that it needs.

        Raises:
            ValueError: if ``phi`` is not shaped like this architecture's meta-parameters.
        """
        _check_meta_parameters(phi, self.template())

        def init(params: PyTree) -> LearnedOptimizerState:
            _match(self.structure, params, "parameter")
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
            direction = zeros if self.base == "momentum" else optax.scale_by_adam().init(zeros)
            averages: PyTree = ()
            if self.backbone != "sgdm":
                averages = jax.tree.map(lambda p: jnp.zeros((len(DECAYS), *p.shape), jnp.float32), params)
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
            return self._update(phi, updates, state, params, factors)

        return optax.GradientTransformationExtraArgs(init, update)

    @property
    def _backbone(self) -> DeepSets:
        extra = 0 if self.gradmetanet is None else self.gradmetanet.out_features
        return DeepSets(PARAMETER_CHANNELS, extra, TIME_CHANNELS, self.width)

    @property
    def _gradmetanet(self) -> GradMetaNet:
        assert self.gradmetanet is not None
        return GradMetaNet(self.structure, self.gradmetanet, channels=1 + len(DECAYS))

    def _init_factor_averages(self) -> PyTree:
        if not self.needs_factors:
            return ()
        s = self.structure
        zeros = [jnp.zeros((len(DECAYS), *shape), jnp.float32) for shape in (*s.activation_shapes, *s.tangent_shapes)]
        return tuple(zeros[: len(s.activation_shapes)]), tuple(zeros[len(s.activation_shapes) :])

    def _update(
        self, phi: PyTree, updates: PyTree, state: LearnedOptimizerState, params: PyTree, factors: Any
    ) -> tuple[PyTree, LearnedOptimizerState]:
        indices = _match(self.structure, params, "parameter")
        if _match(self.structure, updates, "gradient") != indices:
            raise StructureError("the gradients are not those of the parameters: give both for the same leaves")
        # The leaves that are handled, in the order of the gradients' tree; a masked tree lacks some.
        treedef = jax.tree.structure(updates)
        grads = [jnp.asarray(g, jnp.float32) for g in jax.tree.leaves(updates)]
        values = [jnp.asarray(p, jnp.float32) for p in jax.tree.leaves(params)]

        direction, direction_state = self._direction(phi, jax.tree.unflatten(treedef, grads), state.direction)
        steps = jax.tree.leaves(direction)
        gradient_averages, factor_averages = state.gradient_averages, state.factor_averages
        if self.backbone != "sgdm":
            averages = [update_averages(a, g) for a, g in zip(jax.tree.leaves(gradient_averages), grads)]
            gradient_averages = jax.tree.unflatten(treedef, averages)
            extra: Sequence[Any] = [None] * len(grads)
            if self.needs_factors:
                channels, factor_averages = self._factor_channels(state.factor_averages, factors)
                extra = self._extra_features(phi, channels, indices, values)
            features = [parameter_features(*leaf) for leaf in zip(values, grads, averages)]
            if features:
                outputs = self._backbone.apply({"params": phi["backbone"]}, features, extra, time_features(state.step))
                beta = jnp.exp(phi["log_beta"])
                steps = [v + beta * f.reshape(v.shape) for v, f in zip(steps, outputs)]
        alpha = jnp.exp(phi["log_alpha"])
        steps = [(-alpha * v).astype(jnp.result_type(p)) for v, p in zip(steps, jax.tree.leaves(params))]
        step = optax.safe_increment(state.step)
        return (
            jax.tree.unflatten(treedef, steps),
            LearnedOptimizerState(step, direction_state, gradient_averages, factor_averages),
        )

    def _direction(self, phi: PyTree, grads: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        if self.base == "adam":
            return optax.scale_by_adam().update(grads, state)
        one_minus_mu = jnp.exp(phi["log_one_minus_mu"])
        momentum = jax.tree.map(lambda v, g: v + one_minus_mu * (g - v), state, grads)
        return momentum, momentum

    def _factor_channels(self, averages: PyTree, factors: Any) -> tuple[Factors, PyTree]:
        """The channels that GradMetaNet reads: current factors and their moving averages, tangents per element."""
        _check_factors(self.structure, factors)
        current = (
            tuple(jnp.asarray(a, jnp.float32) for a in factors.activations),
            tuple(g.shape[0] * jnp.asarray(g, jnp.float32) for g in factors.tangents),
        )
        new = jax.tree.map(update_averages, averages, current)
        return Factors(*jax.tree.map(lambda x, a: jnp.concatenate([x[None], a]), current, new)), new

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


def _check_factors(structure: GradientStructure, factors: Any) -> None:
    if factors is None:
        raise ValueError(
            "this learned optimizer reads the factors of the gradient: compute them with "
            "value, grads, factors = gmn_lopt.value_grad_and_factors(loss_fn)(params, *args) "
            "and call update(grads, state, params, factors=factors)"
        )
    if not isinstance(factors, Factors):
        raise StructureError(f"factors must be gmn_lopt's Factors, not {type(factors).__name__}")
    for kind, shapes in (("activations", structure.activation_shapes), ("tangents", structure.tangent_shapes)):
        arrays = getattr(factors, kind)
        if len(arrays) != len(shapes):
            raise StructureError(
                f"factors.{kind} holds {len(arrays)} arrays, but {len(shapes)} in the analysed model: "
                "compute the factors of the loss that was analysed"
            )
        for i, (array, shape) in enumerate(zip(arrays, shapes)):
            if array.shape == shape:
                continue
            if array.shape[1:] == shape[1:]:
                raise StructureError(
                    f"factors.{kind}[{i}] has a set of {array.shape[0]} elements, but {shape[0]} when the model was "
                    "analysed: keep the batch size, or analyse anew (moving averages belong to the slots of the batch)"
                )
            raise StructureError(
                f"factors.{kind}[{i}] has shape {array.shape}, but {shape} in the analysed model: "
                "compute the factors of the loss that was analysed"
            )
