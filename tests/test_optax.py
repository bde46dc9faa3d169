"""What users of optax expect of a transformation, of ``default``, which reads factors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizing import mlp, relative_difference

import gmn_lopt

LOSS, PARAMS, BATCH = mlp(6, 10, 3)
STRUCTURE = gmn_lopt.analyze(LOSS, PARAMS, *BATCH)
_, GRADS, FACTORS = gmn_lopt.value_grad_and_factors(LOSS)(PARAMS, *BATCH)
LEARNED = {"load": ("default", STRUCTURE), "denoised": (STRUCTURE,)}
KERNELS = [{"b": False, "w": True}] * 2


def update(tx, state=None, grads=GRADS, params=PARAMS):
    """A compiled step; the updates and the new state."""
    step = jax.jit(lambda grads, state: tx.update(grads, state, params, factors=FACTORS))
    return step(grads, tx.init(params) if state is None else state)


def scaled(tree, factor):
    return jax.tree.map(lambda x: factor * x, tree)


@pytest.mark.parametrize("name", LEARNED)
def test_hyperparameters_in_the_state(name):
    """A learning rate and a weight decay that are changed while training, without compiling anew."""
    make = getattr(gmn_lopt, name)
    tx = optax.inject_hyperparams(make)(*LEARNED[name], learning_rate=0.03, weight_decay=0.1)
    plain, _ = update(make(*LEARNED[name], learning_rate=0.03))
    state, traced = tx.init(PARAMS), []

    @jax.jit
    def step(state):
        traced.append(True)
        return tx.update(GRADS, state, PARAMS, factors=FACTORS)

    for rate, decay in ((0.03, 0.1), (0.06, 0.1), (0.03, 0.0)):
        state.hyperparams.update(learning_rate=jnp.float32(rate), weight_decay=jnp.float32(decay))
        updates, _ = step(state)
        expected = jax.tree.map(lambda u, p, rate=rate, decay=decay: rate * (u / 0.03 - decay * p), plain, PARAMS)
        assert relative_difference(updates, expected) < 1e-5
    assert len(traced) == 1
    assert float(step(state)[1].hyperparams["learning_rate"]) == np.float32(0.03)


def test_a_schedule_and_the_number_of_steps_are_injected_too():
    scheduled = optax.inject_hyperparams(gmn_lopt.load)("default", STRUCTURE, learning_rate=lambda t: 0.03 + 0.03 * t)
    first, state = update(scheduled)
    assert relative_difference(first, update(gmn_lopt.load("default", STRUCTURE, learning_rate=0.03))[0]) < 1e-5
    np.testing.assert_allclose(update(scheduled, state)[1].hyperparams["learning_rate"], 0.06)

    known = optax.inject_hyperparams(gmn_lopt.load, static_args="total_steps")
    tx = known("default", STRUCTURE, learning_rate=0.02, total_steps=50)
    state = tx.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.04)
    expected, _ = update(gmn_lopt.load("default", STRUCTURE, learning_rate=0.04, total_steps=50))
    assert relative_difference(update(tx, state)[0], expected) < 1e-5
    with pytest.raises(Exception, match="total_steps"):  # of another number there would be other arrays
        optax.inject_hyperparams(gmn_lopt.load)("default", STRUCTURE, total_steps=50).init(PARAMS)


MASKS = {
    "tree": KERNELS,
    "function": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    "prefix": [True, False],
    "arrays": jax.tree.map(np.bool_, KERNELS),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("settings", [{"learning_rate": 0.1, "weight_decay": 0.5}, {"total_steps": 20}], ids=str)
def test_weight_decay_by_a_mask_is_where_adamw_has_it(settings, mask):
    def decays(make, without):
        """Where updates differ from those without weight decay, and by how much."""
        return jax.tree.map(lambda a, b: a - b, update(make)[0], update(without)[0])

    without = gmn_lopt.load("default", STRUCTURE, **settings | {"weight_decay": 0.0})
    everywhere = decays(gmn_lopt.load("default", STRUCTURE, **settings), without)
    masked = decays(gmn_lopt.load("default", STRUCTURE, **settings, mask=MASKS[mask]), without)
    adamw = lambda **more: optax.with_extra_args_support(optax.adamw(0.1, **more))  # noqa: E731
    theirs = decays(adamw(weight_decay=0.5, mask=MASKS[mask]), adamw(weight_decay=0.0))
    for ours, most, other in zip(*map(jax.tree.leaves, (masked, everywhere, theirs)), strict=True):
        assert bool(jnp.any(most))
        np.testing.assert_array_equal(ours, most if jnp.any(other) else jnp.zeros_like(ours))


def test_a_mask_of_what_is_masked_or_is_no_mask():
    settings = {"learning_rate": 0.1, "weight_decay": 0.5}
    plain, _ = update(gmn_lopt.load("default", STRUCTURE, **settings, mask=KERNELS))
    inside, _ = update(optax.masked(gmn_lopt.load("default", STRUCTURE, **settings, mask=KERNELS), [False, True]))
    assert relative_difference(inside[1], plain[1]) < 2e-3
    assert relative_difference(update(gmn_lopt.denoised(STRUCTURE, 0.1, 0.5))[0], plain) > 0.01
    for wrong, says in (
        ([True], r"nothing for parameter \[1\]\['b'\]: give a tree like"),
        ({"w": True}, r"nothing for parameter \[0\]\['b'\]"),
        ([1, 0], "consists of booleans"),
        ([True, 0.5], "consists of booleans"),
    ):
        with pytest.raises(gmn_lopt.StructureError, match=says):
            update(gmn_lopt.load("default", STRUCTURE, **settings, mask=wrong))


def test_a_gradient_that_is_not_finite_leaves_all_as_it_was():
    tx = optax.apply_if_finite(gmn_lopt.load("default", STRUCTURE), 3)
    _, state = update(tx)
    broken = jax.tree.map(lambda g: g.at[0].set(jnp.nan), GRADS)
    updates, after = update(tx, state, broken)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    assert int(after.notfinite_count) == 1
    for a, b in zip(jax.tree.leaves(after.inner_state), jax.tree.leaves(state.inner_state), strict=True):
        np.testing.assert_array_equal(a, b)
    again, _ = update(tx, after)
    assert relative_difference(again, update(tx, state)[0]) == 0


def test_the_loop_that_everybody_writes():
    """Clipping that clips, one optimizer of kernels and one of biases, and a rate that is changed, all in one."""
    learned = optax.inject_hyperparams(gmn_lopt.load)("default", STRUCTURE, learning_rate=0.03)
    labels = [{"b": "biases", "w": "kernels"}] * 2
    parts = optax.multi_transform({"kernels": optax.apply_if_finite(learned, 3), "biases": optax.sgd(0.1)}, labels)
    clipped, _ = update(optax.chain(optax.clip_by_global_norm(0.01), parts))
    kernels = optax.masked(gmn_lopt.load("default", STRUCTURE, learning_rate=0.03), KERNELS)
    expected, _ = update(kernels)
    norm = optax.tree.norm(GRADS)
    assert norm > 0.1
    expected = jax.tree.map(lambda u, g, m: u if m else -0.1 * 0.01 * g / norm, expected, GRADS, KERNELS)
    assert relative_difference(clipped, expected) < 1e-4


def mixed_loss(params, x, labels, dtype=jnp.bfloat16, of_last=jnp.bfloat16):
    """As by a policy of jmp: parameters float32, what is computed bfloat16, the loss float32."""
    first, last = (jax.tree.map(lambda p, to=to: p.astype(to), layer) for layer, to in zip(params, (dtype, of_last)))
    hidden = jax.nn.relu(x.astype(dtype) @ first["w"] + first["b"]).astype(of_last)
    logits = (hidden @ last["w"] + last["b"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.mark.parametrize("of_last", [jnp.bfloat16, jnp.float32])
def test_mixed_precision(of_last):
    loss = lambda *args: mixed_loss(*args, of_last=of_last)  # noqa: E731
    structure = gmn_lopt.analyze(loss, PARAMS, *BATCH, strict=True)
    assert [(layer.kernel, layer.bias) for layer in structure.layers] == [(1, 0), (3, 2)]
    _, grads, factors = gmn_lopt.value_grad_and_factors(loss)(PARAMS, *BATCH)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    assert {f.dtype for f in jax.tree.leaves(factors)} == {jnp.dtype(jnp.bfloat16), jnp.dtype(of_last)}
    assert relative_difference(grads, jax.grad(loss)(PARAMS, *BATCH)) == 0
    assert relative_difference(grads, GRADS) < 0.05
    assert relative_difference(structure.reconstruct(factors), GRADS) < 0.05

    tx = gmn_lopt.load("default", structure)
    updates, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS, factors=factors)
    assert {x.dtype for x in jax.tree.leaves((updates, state)) if x.ndim} == {jnp.dtype(jnp.float32)}
    expected, _ = update(tx)
    # A softmax does not see what all logits have in common. In bfloat16 there is rounding, and a part of the step.
    layers = 1 if of_last == jnp.bfloat16 else 2
    assert relative_difference(updates[:layers], expected[:layers]) < 0.1
    assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))
    accumulated = gmn_lopt.multi_steps(tx, 1, structure)
    kept, _ = jax.jit(accumulated.update)(grads, accumulated.init(PARAMS), PARAMS, factors=factors)
    assert relative_difference(kept, updates) < 1e-3


def test_mixed_precision_trains():
    def train(loss):
        tx = gmn_lopt.load("default", STRUCTURE)

        def step(carry, _):
            params, state = carry
            value, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, *BATCH)
            updates, state = tx.update(grads, state, params, factors=factors)
            return (optax.apply_updates(params, updates), state), value

        return jax.jit(lambda: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=40)[1])()

    mixed, full = train(mixed_loss), train(LOSS)
    assert mixed[-1] < 0.1 * full[0]
    assert mixed[20] < full[15]
