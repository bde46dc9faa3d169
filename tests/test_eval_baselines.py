"""The baselines: their schedule in closed form, and SOAP and PSGD-Kron against literal forms with explicit loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gmn_lopt.evaluation.baselines import BASELINES, kron, scheduled, soap
from gmn_lopt.evaluation.baselines.kron import fit, probability, scale_by_kron
from gmn_lopt.evaluation.baselines.soap import scale_by_soap

kron_module, soap_module = (__import__(f.__module__, fromlist=["x"]) for f in (kron, soap))


def gradients(steps: int, shape=(4, 3)) -> list[np.ndarray]:
    """Gradients with a spectrum: both sides have well separated eigenvalues."""
    rng = np.random.default_rng(0)
    scale = np.outer(2.0 ** -np.arange(shape[0]), 3.0 ** -np.arange(shape[1]))
    return [scale * rng.normal(size=shape) + 0.1 * rng.normal(size=shape) for _ in range(steps)]


def updates_of(tx: optax.GradientTransformation, grads: list[np.ndarray]) -> list[np.ndarray]:
    params = {"w": jnp.zeros(grads[0].shape)}
    state, found = tx.init(params), []
    step = jax.jit(tx.update)
    for grad in grads:
        updates, state = step({"w": jnp.asarray(grad, jnp.float32)}, state, params)
        found.append(np.asarray(updates["w"]))
    return found


@pytest.mark.parametrize("total", [2000, 500, 30, 3, 1])
def test_the_schedule_is_a_warm_up_and_a_cosine(total):
    schedule, peak, warmup = scheduled(0.3, total), 0.3, max(1, round(total / 20))
    for t in sorted({0, 1, warmup // 2, warmup, (warmup + total) // 2, total - 1}):
        if t < warmup:
            expected = peak * t / warmup
        else:
            expected = peak * (1 + math.cos(math.pi * (t - warmup) / max(1, total - warmup))) / 2
        assert float(schedule(t)) == pytest.approx(expected, abs=1e-7)
    assert float(schedule(max(total, 2))) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda each: each.name)
def test_every_baseline_has_the_schedule_and_decays_weights(baseline):
    """At the horizon nothing moves; without a gradient the weights shrink by rate times decay."""
    params = {"w": jnp.full((4, 3), 2.0), "b": jnp.ones(3)}
    settings = {axis.name: 0.1 for axis in baseline.axes} | {"weight_decay": 0.5}
    tx = baseline.construct(20, **settings)
    state, none = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for t in range(20):
        updates, state = jax.jit(tx.update)(none, state, params)
        expected = -scheduled(0.1, 20)(t) * 0.5
        for key in params:
            np.testing.assert_allclose(updates[key], expected * params[key], atol=1e-7)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert all(float(jnp.abs(u).max()) < 1e-7 for u in updates.values())


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda each: each.name)
def test_every_baseline_minimises_and_can_be_traced(baseline):
    """A badly scaled quadratic with a vector, a scalar and a convolution's kernel, several rates in one program."""
    scales = {"w": jnp.outer(jnp.array([1.0, 0.1, 0.01, 1.0]), jnp.array([1.0, 0.3, 0.1]))}
    scales |= {"b": jnp.ones(3), "s": jnp.ones(()), "k": jnp.ones((3, 2, 2))}
    start = jax.tree.map(jnp.ones_like, scales)
    loss = lambda params: sum(jnp.sum(s * (p - 0.3) ** 2) for p, s in zip(*map(jax.tree.leaves, (params, scales))))  # noqa: E731

    @jax.jit
    @jax.vmap
    def train(settings):
        tx = baseline.construct(100, **settings)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), None, 100)
        return loss(params)

    rates = jnp.array([0.06, 0.12, 0.0])
    settings = {axis.name: rates for axis in baseline.axes} | {"weight_decay": jnp.zeros(3)}
    ends = train(settings)
    assert (ends[:2] < 0.1 * loss(start)).all()
    assert ends[2] == pytest.approx(float(loss(start)))


def literal_soap(grads: list[np.ndarray], rotated=(True, True)) -> list[np.ndarray]:
    """Algorithms 3 and 4 of arXiv:2409.11321, entry by entry; the first gradient only makes the bases."""
    b1, b2, rows, columns = 0.95, 0.95, *grads[0].shape
    first, second = np.zeros((rows, columns)), np.zeros((rows, columns))
    left, right = np.zeros((rows, rows)), np.zeros((columns, columns))
    q_left, q_right = np.eye(rows), np.eye(columns)
    found = []
    for t, g in enumerate(grads):
        update = np.zeros((rows, columns))
        if t > 0:
            for i in range(rows):
                for j in range(columns):
                    first[i, j] = b1 * first[i, j] + (1 - b1) * g[i, j]
            turned = np.zeros((rows, columns))
            for i in range(rows):
                for j in range(columns):
                    pairs = [(a, b) for a in range(rows) for b in range(columns)]
                    g_turned = sum(q_left[a, i] * g[a, b] * q_right[b, j] for a, b in pairs)
                    m_turned = sum(q_left[a, i] * first[a, b] * q_right[b, j] for a, b in pairs)
                    second[i, j] = b2 * second[i, j] + (1 - b2) * g_turned**2
                    turned[i, j] = m_turned / (1 - b1**t) / math.sqrt(second[i, j] / (1 - b2**t))
            for a in range(rows):
                for b in range(columns):
                    pairs = [(i, j) for i in range(rows) for j in range(columns)]
                    update[a, b] = sum(q_left[a, i] * turned[i, j] * q_right[b, j] for i, j in pairs)
        found.append(update)
        weight = 1 - b2 if t > 0 else 1.0
        left, right = (1 - weight) * left + weight * g @ g.T, (1 - weight) * right + weight * g.T @ g
        if t == 0:
            q_left, q_right = (np.linalg.eigh(each)[1][:, ::-1] for each in (left, right))
        elif t % 10 == 0:
            q_left, q_right = (np.linalg.qr(each @ q)[0] for each, q in ((left, q_left), (right, q_right)))
        q_left, q_right = (q if own else np.eye(len(q)) for q, own in zip((q_left, q_right), rotated))
    return found


def test_soap_equals_a_literal_form():
    grads = gradients(25)
    for own, literal in zip(updates_of(scale_by_soap(), grads), literal_soap(grads)):
        np.testing.assert_allclose(own, literal, atol=2e-3)


def test_soap_leaves_long_sides_and_vectors_as_they_are(monkeypatch):
    monkeypatch.setattr(soap_module, "LARGEST_SIDE", 3)
    grads = gradients(15)
    for own, literal in zip(updates_of(scale_by_soap(), grads), literal_soap(grads, (False, True))):
        np.testing.assert_allclose(own, literal, atol=2e-3)
    vectors = [grad[0] for grad in grads]
    adam = updates_of(optax.scale_by_adam(0.95, 0.95), vectors[1:])
    found = updates_of(scale_by_soap(), vectors)
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_allclose(found[1:], adam, rtol=1e-4)


def literal_fit(q, r, x, v):
    """One step of arXiv:2402.11858's triangular and diagonal factors, entry by entry."""
    full = [np.diag(each) if each.ndim == 1 else each for each in (q, r)]
    a = full[0] @ x @ full[1].T
    b = np.linalg.inv(full[0]).T @ v @ np.linalg.inv(full[1])
    new = []
    for factor, dense, one, other in ((q, full[0], a, b), (r, full[1], a.T, b.T)):
        n = len(dense)
        plus, minus = np.zeros((n, n)), np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                plus[i, j] = sum(one[i, k] * one[j, k] for k in range(one.shape[1]))
                minus[i, j] = sum(other[i, k] * other[j, k] for k in range(one.shape[1]))
        total = plus + minus
        if factor.ndim == 1:
            new.append(factor - 0.1 * np.diag(plus - minus) / np.diag(total).max() * factor)
            continue
        row = total[np.argmax([np.linalg.norm(total[i]) for i in range(n)])]
        norm = np.linalg.norm(total @ row) / np.linalg.norm(row)
        step = np.array([[(plus - minus)[i, j] if i <= j else 0.0 for j in range(n)] for i in range(n)])
        new.append(dense - 0.1 / norm * step @ dense)
    balance = math.sqrt(np.abs(new[1]).max() / np.abs(new[0]).max())
    return new[0] * balance, new[1] / balance


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_step_of_krons_factors_equals_a_literal_form(diagonal):
    rng = np.random.default_rng(1)
    q = np.abs(rng.normal(size=4)) + 0.5 if diagonal else np.triu(rng.normal(size=(4, 4))) + 2 * np.eye(4)
    r = np.triu(rng.normal(size=(3, 3))) + 2 * np.eye(3)
    x, key = rng.normal(size=(4, 3)), jax.random.key(3)
    v = np.asarray(jax.random.normal(key, (4, 3)))
    own = fit((jnp.asarray(q, jnp.float32), jnp.asarray(r, jnp.float32)), jnp.asarray(x, jnp.float32), key)
    for found, literal in zip(own, literal_fit(q, r, x, v)):
        np.testing.assert_allclose(found, literal, rtol=2e-4, atol=1e-5)


def test_kron_equals_a_literal_form(monkeypatch):
    """Whole steps: momentum, factors that are fitted at some of them, preconditioning, clipping."""
    monkeypatch.setattr(kron_module, "probability", lambda count: 0.6)
    grads = gradients(12)
    momentum, q, r = np.zeros((4, 3)), np.eye(4), np.eye(3)
    fitted = 0
    for t, (g, own) in enumerate(zip(grads, updates_of(scale_by_kron(), grads))):
        momentum = 0.9 * momentum + 0.1 * g
        x = momentum / (1 - 0.9 ** (t + 1))
        due, key = jax.random.split(jax.random.fold_in(jax.random.key(0), t))
        if jax.random.uniform(due) < 0.6:
            fitted += 1
            q, r = literal_fit(q, r, x, np.asarray(jax.random.normal(key, (4, 3))))
        update = q.T @ q @ x @ r.T @ r
        update /= max(1, np.sqrt(np.mean(update**2)) / 1.1)
        np.testing.assert_allclose(own, update, rtol=2e-3, atol=2e-4)
    assert 0 < fitted < 12


def test_kron_whitens():
    """Of gradients with a Kronecker-factored covariance the preconditioner becomes the inverse root, up to noise."""
    left, right = np.diag([4.0, 1.0, 0.25]), np.diag([2.0, 0.5])
    q, r = jnp.eye(3), jnp.eye(2)

    @jax.jit
    def step(carry, key):
        x = left @ jax.random.normal(key, (3, 2)) @ right
        new = fit(carry, x, jax.random.fold_in(key, 1))
        return new, (new[0].T @ new[0], new[1].T @ new[1])

    _, (p, s) = jax.lax.scan(step, (q, r), jax.random.split(jax.random.key(0), 4000))
    p, s = p[2000:].mean(axis=0), s[2000:].mean(axis=0)
    np.testing.assert_allclose(np.diag(p) / p[1, 1], [1 / 4, 1, 4], rtol=0.15)
    np.testing.assert_allclose(np.diag(s)[1] / s[0, 0], 4, rtol=0.15)
    np.testing.assert_allclose(p[1, 1] * s[0, 0], 1 / 2, rtol=0.2)


def test_kron_fits_less_often_later():
    found = [float(probability(jnp.array(count))) for count in (0, 500, 1500, 10_000)]
    np.testing.assert_allclose(found, [1, 1, math.exp(-1), 0.03], rtol=1e-5)


def test_muon_has_a_rate_of_its_own_for_adam():
    params = {"w": jnp.zeros((4, 4)), "k": jnp.zeros((2, 2, 4)), "b": jnp.zeros(3)}
    grads = {"w": jnp.diag(jnp.array([4.0, 3, 2, 1])), "k": jnp.eye(4).reshape(2, 2, 4), "b": jnp.array([1.0, -2, 3])}
    (muon,) = (each for each in BASELINES if each.name == "muon")
    tx = muon.construct(20, learning_rate=0.2, weight_decay=0.0, adam_learning_rate=0.01)
    adam = optax.nadamw(scheduled(0.01, 20), weight_decay=0.0)
    state, of_adam = tx.init(params), adam.init(params)
    for _ in range(2):  # the first rate is 0, the second that of the peak
        updates, state = tx.update(grads, state, params)
        expected, of_adam = adam.update(grads, of_adam, params)
    np.testing.assert_allclose(updates["b"], expected["b"], rtol=1e-5)
    for key in ("w", "k"):  # near an orthogonal matrix, as five steps of Newton and Schulz make it
        singular = np.linalg.svd(np.asarray(updates[key]).reshape(4, 4), compute_uv=False) / 0.2
        assert (singular > 0.6).all() and (singular < 1.3).all()
