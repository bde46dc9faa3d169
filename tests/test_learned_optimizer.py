"""The update rule against numpy, and the rules that optax transformations obey."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import unf_reference
from optimizing import analyzed, lively, mlp, optimizer_of, play, record, relative_difference, small

import gmn_lopt
from gmn_lopt import (
    UNF,
    Constant,
    Denoised,
    Factors,
    Feedback,
    GradMetaNetConfig,
    LearnedOptimizer,
    Momentum,
    Muon,
    PaperFeatures,
    PointwiseMLP,
    Recipe,
    SetReader,
    StructureError,
)
from gmn_lopt.optimizers import RECIPES
from gmn_lopt.optimizers.features.paper import DECAYS, update_averages

READER = SetReader(GradMetaNetConfig(width=8, product_width=8))
RESIDUALS = {
    "sgdm": None,
    "ds": small(),
    "ds+gmn": small(gradmetanet=READER),
    "unf": small(network=UNF(8, 3)),
    "unf+gmn": small(network=UNF(8, 3), gradmetanet=READER),
}
DIRECTIONS = (Momentum(), Muon(), Denoised())
MODEL = mlp(5, 7, 4)
STRUCTURE = analyzed(MODEL)
RECORDED = record(MODEL, steps=4)


@functools.cache
def optimizer(residual="ds+gmn", direction=DIRECTIONS[0]):
    lopt = LearnedOptimizer(STRUCTURE, direction, RESIDUALS[residual])
    return lopt, lively(lopt)


def numpy_features(parameter, gradient, averages, t):
    channels = []
    for x in (parameter, gradient, *averages):
        x = np.clip(np.asarray(x, np.float64).ravel(), -1, 1)
        channels.append(x / np.sqrt(np.mean(x**2) + 1e-5))
    taus = (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)
    return np.concatenate(
        [np.stack(channels, 1), np.tile(np.tanh(t / np.array(taus) - 1), (parameter.size, 1))], axis=1
    )


def test_features_are_clipped_then_normalised():
    rng = np.random.default_rng(0)
    parameter, gradient = rng.normal(size=(2, 3, 4)).astype(np.float32) * np.array([[[1.0]], [[3.0]]], np.float32)
    averages = (rng.normal(size=(6, 3, 4)) * 10.0 ** np.arange(-4, 2)[:, None, None]).astype(np.float32)
    expected = numpy_features(parameter, gradient, averages, 17)
    np.testing.assert_allclose(
        PaperFeatures().of_entries(*map(jnp.asarray, (parameter, gradient, averages, 17))), expected[:, :8], rtol=1e-5
    )
    np.testing.assert_allclose(PaperFeatures().of_time(jnp.array(17)), expected[0, 8:], rtol=1e-5)
    assert expected.shape[1] == 19


def test_averages_are_exponential_moving_averages():
    values = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    averages = jnp.zeros((6, 3))
    for value in values:
        averages = update_averages(averages, jnp.asarray(value), DECAYS)
    for decay, average in zip((0.1, 0.5, 0.9, 0.99, 0.999, 0.9999), averages, strict=True):
        weights = (1 - decay) * decay ** np.arange(4, -1, -1.0)
        np.testing.assert_allclose(average, weights @ values, rtol=1e-4)


def numpy_updates(lopt, phi):
    """The whole rule for all recorded steps, with every channel concatenated and repeated as section 5 says."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), phi)
    leaves = [[np.asarray(g, np.float64) for g in jax.tree.leaves(grads)] for _, grads, _ in RECORDED]
    averages = [np.zeros((6, *g.shape)) for g in leaves[0]]
    momentum = [np.zeros_like(g) for g in leaves[0]]
    factor_averages = [np.zeros((6, *x.shape)) for x in jax.tree.leaves(RECORDED[0][2])]
    decays, updates = np.array(DECAYS), []
    for t, ((params, _, factors), grads) in enumerate(zip(RECORDED, leaves)):
        extra = [None] * len(grads)
        if lopt.needs_factors:
            kinds = len(factors.activations)
            slots = [np.asarray(x, np.float64) for x in jax.tree.leaves(factors)]
            slots = slots[:kinds] + [len(g) * g for g in slots[kinds:]]
            ema = decays[:, None, None]
            factor_averages = [ema * a + (1 - ema) * x for a, x in zip(factor_averages, slots)]
            channels = [jnp.asarray(np.stack([x, *a]), jnp.float32) for x, a in zip(slots, factor_averages)]
            channels = gmn_lopt.Factors(tuple(channels[:kinds]), tuple(channels[kinds:]))
            module = READER.network.module(STRUCTURE, 7)
            extra = jax.jit(module.apply)({"params": phi["residual"]["gradmetanet"]}, channels)
        directions, inputs = [], []
        for i, (parameter, gradient) in enumerate(zip(jax.tree.leaves(params), grads)):
            shape = (6,) + (1,) * gradient.ndim
            averages[i] = decays.reshape(shape) * averages[i] + (1 - decays).reshape(shape) * gradient
            one_minus_mu = np.exp(w["direction"]["log_one_minus_mu"])
            v = momentum[i] = (1 - one_minus_mu) * momentum[i] + one_minus_mu * gradient
            if lopt.residual is not None:
                x = numpy_features(parameter, gradient, averages[i], t)
                if extra[i] is not None:
                    x = np.concatenate([x[:, :8], np.asarray(extra[i]).reshape(len(x), -1), x[:, 8:]], axis=1)
                inputs.append(x)
            directions.append(v)
        outputs = numpy_network(lopt.residual.network, w["residual"]["network"], inputs) if inputs else []
        for i, out in enumerate(outputs):
            directions[i] = directions[i] + np.exp(w["residual"]["log_beta"]) * out.reshape(directions[i].shape)
        updates.append([-np.exp(w["step_size"]["log_alpha"]) * v for v in directions])
    return updates


def numpy_network(network, w, inputs):
    """The network's outputs for the channels of each leaf."""
    mlp = w["mlp"] if network.tied else w
    for k in range(3):
        inputs = [np.maximum(x @ mlp[f"kernel_{k}"] + mlp[f"bias_{k}"], 0) for x in inputs]
    if not network.tied:
        return [x @ w["kernel_3"] + w["bias_3"] for x in inputs]
    shaped = [x.reshape(*p.shape, -1) for x, p in zip(inputs, STRUCTURE.parameters)]
    return unf_reference.apply([p.spaces for p in STRUCTURE.parameters], {}, w["layer"], shaped)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_update_is_the_rule(residual):
    lopt, phi = optimizer(residual)
    for update, expected in zip(play(lopt, phi, RECORDED), numpy_updates(lopt, phi), strict=True):
        assert relative_difference(update, expected) < 1e-4


def test_starting_coefficients():
    lopt = gmn_lopt.recipe("ds", STRUCTURE)
    start = {name: float(value) for name, value in lopt.scalars(lopt.init(jax.random.key(0))).items()}
    assert start == pytest.approx({"alpha": 0.1, "beta": 0.001, "mu": 0.9})
    assert not lopt.needs_factors and gmn_lopt.recipe("ds+gmn", STRUCTURE).needs_factors


def test_meta_parameters_fit_other_widths_depths_and_batch_sizes():
    lopt, phi = optimizer()
    for model in (mlp(3, 20, 2, batch=5), mlp(4, 6, 5, 7, 3)):
        other = Recipe.of(lopt).build(analyzed(model))
        assert jax.tree.map(jnp.shape, other.template()) == jax.tree.map(jnp.shape, phi)
        update = play(other, phi, record(model, steps=1))[0]
        assert jax.tree.map(jnp.shape, update) == jax.tree.map(jnp.shape, model[1])
        assert all(jnp.isfinite(u).all() and jnp.any(u != 0) for u in jax.tree.leaves(update))


@pytest.mark.parametrize("name", gmn_lopt.optimizers.RECIPES)
def test_every_recipe_makes_steps(name):
    lopt = gmn_lopt.recipe(name, STRUCTURE)
    updates = play(lopt, lopt.init(jax.random.key(0)), RECORDED[:1])[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, MODEL[1])
    assert all(jnp.isfinite(u).all() and jnp.any(u != 0) for u in jax.tree.leaves(updates))
    with pytest.raises(ValueError, match="unknown recipe 'sgd': choose one of sgdm, ds"):
        gmn_lopt.recipe("sgd", STRUCTURE)


def run(tx, params=MODEL[1], **extra):
    """Two compiled steps of a transformation; returns the last updates."""
    state = tx.init(params)

    @jax.jit
    def step(grads, state, factors):
        return tx.update(grads, state, params, factors=factors, **extra)

    for _, grads, factors in RECORDED[:2]:
        updates, state = step(grads, state, factors)
    return updates


def test_unknown_arguments_are_ignored_and_factors_too_where_not_needed():
    plain, phi = optimizer("ds")
    tx = plain.optimizer(phi)
    updates, _ = tx.update(RECORDED[0][1], tx.init(MODEL[1]), MODEL[1])
    more, _ = tx.update(RECORDED[0][1], tx.init(MODEL[1]), MODEL[1], factors=3, value=jnp.ones(()), other="x")
    assert relative_difference(more, updates) == 0


def test_chains_with_clipping_weight_decay_and_schedules():
    lopt, phi = optimizer("ds")
    tx = lopt.optimizer(phi)
    plain = run(tx)
    chained = run(optax.chain(tx, optax.add_decayed_weights(-0.1), optax.scale_by_schedule(lambda t: 1.0 + t)))
    expected = jax.tree.map(lambda u, p: 2.0 * (u - 0.1 * p), plain, MODEL[1])
    assert relative_difference(chained, expected) < 1e-5
    clipped = run(optax.chain(optax.clip_by_global_norm(1e6), tx))
    assert relative_difference(clipped, plain) < 1e-5
    injected = run(optax.inject_hyperparams(lambda scale: optax.chain(tx, optax.scale(scale)))(scale=lambda t: 0.5 + t))
    assert relative_difference(injected, jax.tree.map(lambda u: 1.5 * u, plain)) < 1e-5


@pytest.mark.parametrize("network", [PointwiseMLP(8, 3), UNF(8, 3)])
def test_without_its_last_layer_an_untrained_optimizer_is_its_direction(network):
    lopt = LearnedOptimizer(STRUCTURE, residual=small(network=network, output_scale=0.0))
    base = LearnedOptimizer(STRUCTURE)
    phi = lopt.init(jax.random.key(0))
    assert relative_difference(play(lopt, phi, RECORDED), play(base, base.init(jax.random.key(0)), RECORDED)) < 1e-6


@pytest.mark.parametrize("prefix", [False, True])
def test_masked_and_partitioned_parameters_get_the_updates_they_get_among_all(prefix):
    lopt, phi = optimizer()
    tx = lopt.optimizer(phi)
    plain, grads = run(tx), RECORDED[1][1]
    mask = [True, False] if prefix else [{"b": False, "w": True}, {"b": True, "w": False}]
    full = [{"b": True, "w": True}, {"b": False, "w": False}] if prefix else mask

    masked = run(optax.masked(tx, mask))
    assert relative_difference(masked, jax.tree.map(lambda m, u, g: u if m else g, full, plain, grads)) < 1e-5
    # unf mixes the parameters, so those that it is not given are missing in the update of the others.
    unf, weights = optimizer("unf+gmn")
    other = run(optax.masked(unf.optimizer(weights), mask))
    assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, plain)
    assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(other))
    labels = jax.tree.map(lambda m: "learned" if m else "sgd", mask)
    partitioned = run(optax.partition({"learned": tx, "sgd": optax.sgd(0.1)}, labels))
    assert (
        relative_difference(partitioned, jax.tree.map(lambda m, u, g: u if m else -0.1 * g, full, plain, grads)) < 1e-5
    )


def test_multi_steps_update_with_the_mean_gradient():
    lopt, phi = optimizer()
    tx = lopt.optimizer(phi)
    wrapped = optax.MultiSteps(tx, every_k_schedule=2)
    step = jax.jit(lambda grads, state, factors: wrapped.update(grads, state, MODEL[1], factors=factors))
    state = wrapped.init(MODEL[1])
    for _, grads, factors in RECORDED[:2]:
        updates, state = step(grads, state, factors)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, RECORDED[0][1], RECORDED[1][1])
    expected, _ = tx.update(mean, tx.init(MODEL[1]), MODEL[1], factors=RECORDED[1][2])
    assert relative_difference(updates, expected) < 1e-5
    assert int(state.inner_opt_state.step) == 1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_optax_can_map_over_the_state(direction):
    lopt, phi = optimizer(direction=direction)
    tx = lopt.optimizer(phi)
    state = optax.tree_map_params(tx, lambda x: x + 1.0, tx.init(MODEL[1]))
    per_layer = getattr(state.direction, "preconditioners", ())
    momentum = getattr(state.direction, "momentum", state.direction)
    assert all((x == 1.0).all() for x in jax.tree.leaves((momentum, state.residual.gradients)))
    assert all((x == 0.0).all() for x in jax.tree.leaves((state.step, state.residual.factors, per_layer)))


def test_updates_have_the_parameters_dtypes():
    lopt, phi = optimizer()
    params, grads, factors = jax.tree.map(lambda x: x.astype(jnp.bfloat16), RECORDED[0])
    tx = lopt.optimizer(phi)
    updates, state = tx.update(grads, tx.init(params), params, factors=factors)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state._replace(step=()))} == {jnp.dtype(jnp.float32)}
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads, factors))
    assert (
        relative_difference(jax.tree.map(lambda u: u.astype(jnp.float32), updates), play(lopt, phi, [exact])[0]) < 1e-2
    )


def test_scan_and_vmap_over_meta_parameters_agree_with_single_steps():
    lopt, phi = optimizer()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), phi)
    params, grads, factors = jax.tree.map(lambda *x: jnp.stack(x), *RECORDED)

    def unroll(phi):
        tx = lopt.optimizer(phi)

        def step(state, inputs):
            params, grads, factors = inputs
            updates, state = tx.update(grads, state, params, factors=factors)
            return state, updates

        return jax.lax.scan(step, tx.init(MODEL[1]), (params, grads, factors))[1]

    both = jax.jit(jax.vmap(unroll))(stacked)
    for i in range(2):
        single = play(lopt, jax.tree.map(lambda x, i=i: x[i], stacked), RECORDED)[-1]
        assert relative_difference(jax.tree.map(lambda x, i=i: x[i, -1], both), single) < 1e-4


def test_missing_arguments_say_what_is_needed():
    lopt, phi = optimizer()
    tx, (params, grads, factors) = lopt.optimizer(phi), RECORDED[0]
    state = tx.init(params)
    with pytest.raises(ValueError, match="value_grad_and_factors"):
        tx.update(grads, state, params)
    with pytest.raises(ValueError, match="reads the parameters"):
        tx.update(grads, state, factors=factors)
    with pytest.raises(StructureError, match="Factors"):
        tx.update(grads, state, params, factors=(factors.activations, factors.tangents))


def test_parameters_gradients_and_factors_of_another_model_are_refused():
    lopt, phi = optimizer()
    tx, (params, grads, factors) = lopt.optimizer(phi), RECORDED[0]
    state = tx.init(params)
    with pytest.raises(StructureError, match=r"parameter \[0\]\['w'\] has shape \(5, 8\), but \(5, 7\)"):
        tx.init([{"b": params[0]["b"], "w": jnp.ones((5, 8))}, params[1]])
    with pytest.raises(StructureError, match=r"parameter \[2\]\['b'\] is not in the analysed model"):
        tx.init(mlp(5, 7, 4, 3)[1])
    with pytest.raises(StructureError, match=r"parameter \[1\]\['b'\] of the analysed model is missing"):
        tx.init(params[:1])
    with pytest.raises(StructureError, match=r"gradient \[1\]\['w'\] has shape"):
        tx.update([grads[0], {"b": grads[1]["b"], "w": grads[1]["w"].T}], state, params, factors=factors)
    with pytest.raises(StructureError, match="same leaves"):
        tx.update([grads[0], optax.MaskedNode()], state, params, factors=factors)
    with pytest.raises(StructureError, match=r"a set of 6 elements is read, but .* the 12 slots"):
        tx.update(grads, state, params, factors=jax.tree.map(lambda x: x[:6], factors))
    with pytest.raises(StructureError, match=r"tangents\[0\] has a set of 12 elements, but"):
        tx.update(grads, state, params, factors=Factors(tuple(a[:6] for a in factors.activations), factors.tangents))
    with pytest.raises(StructureError, match=r"activations\[1\] has shape \(12, 8\), but \(12, 7\)"):
        tx.update(grads, state, params, factors=record(mlp(5, 8, 4), steps=1)[0][2])
    with pytest.raises(StructureError, match=r"activations holds 3 arrays, but 2"):
        tx.update(grads, state, params, factors=record(mlp(5, 7, 4, 4), steps=1)[0][2])


@pytest.mark.parametrize(
    ("direction", "residual"),
    [
        (Denoised(), small()),
        (Momentum(), small(gradmetanet=dataclasses.replace(READER, max_set_size=5))),
        (Momentum(), small(gradmetanet=dataclasses.replace(READER, decays=()))),
    ],
)
def test_batches_of_another_size_are_taken_where_nothing_belongs_to_their_slots(direction, residual):
    model, (loss, params, (x, y)) = mlp(5, 7, 4), mlp(5, 7, 4)
    smaller = loss, params, (x[:9], y[:9])
    lopts = [LearnedOptimizer(analyzed(m), direction, residual) for m in (model, smaller)]
    phi, steps = lively(lopts[0]), [*record(model, steps=2), *record(smaller, steps=2)]
    update = jax.jit(lambda lopt, *a, factors: lopt.optimizer(phi).update(*a, factors=factors), static_argnums=0)
    state = lopts[0].optimizer(phi).init(params)
    for params, grads, factors in steps[:2]:
        _, state = update(lopts[0], grads, state, params, factors=factors)
    for params, grads, factors in steps[2:]:
        results = [update(lopt, grads, state, params, factors=factors) for lopt in lopts]
        jax.tree.map(np.testing.assert_array_equal, *results)
        state = results[0][1]


def test_meta_parameters_of_another_architecture_are_refused():
    lopt, phi = optimizer()
    _, without = optimizer("ds")
    with pytest.raises(ValueError, match=r"phi lacks \['residual'\]\['gradmetanet'\]"):
        lopt.optimizer(without)
    wider = LearnedOptimizer(STRUCTURE, residual=small(network=PointwiseMLP(9, 3), gradmetanet=READER))
    with pytest.raises(ValueError, match=r"\['network'\]\['bias_0'\] has shape \(9,\), but \(8,\)"):
        lopt.optimizer(wider.init(jax.random.key(0)))
    with pytest.raises(ValueError, match=r"phi lacks \['step_size'\]\['log_alpha'\]"):
        lopt.optimizer({name: value for name, value in phi.items() if name != "step_size"})


def test_a_model_without_any_factors_is_optimized_all_the_same():
    params = {"loose": jnp.arange(3.0)}
    structure = gmn_lopt.analyze(lambda p: (p["loose"] ** 2).sum(), params)
    lopt = LearnedOptimizer(structure, residual=RESIDUALS["ds+gmn"])
    assert not lopt.needs_factors
    tx = lopt.optimizer(optimizer()[1])
    updates, _ = tx.update(params, tx.init(params), params)
    assert jnp.isfinite(updates["loose"]).all() and jnp.any(updates["loose"] != 0)


EVERY = {**{name: RECIPES[name] for name in RECIPES}, "muon": Recipe(Muon(), step_size=Constant(feedback=Feedback()))}


@pytest.mark.parametrize("name", EVERY)
def test_a_fresh_state_can_be_donated_and_lies_where_the_parameters_do(name):
    """No two leaves share a buffer, and what is shaped like a parameter is sharded like it."""
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec())
    params = jax.device_put(MODEL[1], sharding)
    lopt = EVERY[name].build(STRUCTURE)
    state = optimizer_of(lopt, lopt.init(jax.random.key(0))).init(params)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size]
    assert len(buffers) == len(set(buffers))
    shapes = {p.shape for p in jax.tree.leaves(params)} - {(4,)}  # the step size keeps a number for each leaf
    like_parameters = [leaf for leaf in jax.tree.leaves(state) if leaf.shape in shapes]
    assert like_parameters and all(leaf.sharding == sharding for leaf in like_parameters)
    jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state) if leaf.size)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["default", "default+gmn", "cifar10_mlp-ds+gmn", "unf+gmn", "ds+gmn++"])
def test_steps_in_a_loop_with_64_bit_types_enabled(name, dtype):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), dtype), MODEL[1])
        structure = gmn_lopt.analyze(MODEL[0], params, *MODEL[2])
        if name in gmn_lopt.list_pretrained():
            tx = gmn_lopt.load(name, structure)
        else:
            lopt = gmn_lopt.recipe(name, structure)
            tx = lopt.optimizer(lopt.init(jax.random.key(0)))

        def step(carry, _):
            params, state = carry
            value, grads, factors = gmn_lopt.value_grad_and_factors(MODEL[0])(params, *MODEL[2])
            updates, state = tx.update(grads, state, params, factors=factors)
            return (optax.apply_updates(params, updates), state), value

        start = params, tx.init(params)
        end, values = jax.jit(lambda start: jax.lax.scan(step, start, length=3))(start)
        chex.assert_trees_all_equal_shapes_and_dtypes(start, end)
        assert values[-1] < values[0]
