"""The noise of a convolution's gradient against the exact one, that of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gmn_lopt
from gmn_lopt.factors import Conv
from gmn_lopt.optimizers.directions.denoised_layers import LayerGroup, as_matrices, layer_groups
from gmn_lopt.tasks import load_task

BATCH, DAMPING = 128, 0.5


def network(params, x):
    x = x.reshape(-1, 8, 8, 1)
    for i, layer in enumerate(params["conv"]):
        numbers = ("NHWC", "HWIO", "NHWC")
        groups = x.shape[-1] // layer["kernel"].shape[2]
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (1 + i % 2,) * 2, "SAME", dimension_numbers=numbers, feature_group_count=groups
        )
        x = jax.nn.relu(x + layer["bias"])
    return x.mean((1, 2)) @ params["out"]


def loss(params, batch):
    logits = network(params, batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def draw():
    shapes, rng = [(3, 3, 1, 16), (3, 3, 16, 16), (3, 3, 4, 16)], np.random.default_rng(0)
    conv = [{"kernel": rng.normal(size=s) * (2 / np.prod(s[:-1])) ** 0.5, "bias": np.zeros(16)} for s in shapes]
    tree = {"conv": conv, "out": rng.normal(size=(16, 10)) * 0.25}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.fixture(scope="module", params=[0, 40])
def compared(request):
    """For each layer the exact noise, that of positions as elements, and what is used, of models trained so long."""
    digits, params = load_task("digits_mlp"), draw()
    batches = [digits.sample(jax.random.key(i), digits.data["train"]) for i in range(request.param + 1)]
    tx = optax.adam(1e-2)
    state, gradient = tx.init(params), jax.jit(jax.grad(loss))
    for batch in batches[:-1]:
        updates, state = tx.update(gradient(params, batch), state)
        params = optax.apply_updates(params, updates)
    structure = gmn_lopt.analyze(loss, params, batches[-1])
    _, _, factors = jax.jit(gmn_lopt.value_grad_and_factors(loss))(params, batches[-1])
    one = lambda example: jax.grad(loss)(params, jax.tree.map(lambda x: x[None], example))  # noqa: E731
    leaves = jax.tree.leaves(jax.jit(lambda batch: jax.lax.map(one, batch))(batches[-1]))
    groups = layer_groups(structure, range(len(structure.parameters)))
    cases = [(group, layer) for group in groups for layer in group.layers if isinstance(layer.kind, Conv)]
    compare = jax.jit(noises, static_argnums=(0, 3, 4))
    return [compare(structure, factors, leaves, *case) for case in sorted(cases, key=lambda case: case[1].kernel)]


def noises(structure, factors, leaves, group, layer):
    alone = LayerGroup((layer,), layer.inputs)
    gradients = jax.vmap(lambda one: as_matrices(alone, structure.parameters, one))([x / BATCH for x in leaves])
    activation, tangent = factors.activations[layer.activation], factors.tangents[layer.tangent]
    # All patches, not only those that an optimizer reads.
    positions = np.prod(layer.kind.tangent.image)
    every = np.divmod(np.arange(BATCH * positions), positions)
    patches = jnp.pad(
        layer.kind.patches(layer.parameter, activation, *every), ((0, 0), (0, 0), (0, 1)), constant_values=1.0
    )
    moment = patches.mT @ patches / patches.shape[1]
    scale = jnp.trace(moment, axis1=1, axis2=2)[:, None, None] / group.inputs
    inverse = jnp.linalg.inv(moment + DAMPING * scale * jnp.eye(group.inputs))
    # What dense layers have for d: both dampen the same directions.
    seen = jnp.einsum("cij,cji->c", inverse, moment)[:, None, None]
    exact = jnp.einsum("ncio,cij,ncjp->cop", gradients, inverse, gradients) / seen
    elements = layer.kind.tangent_rows(layer.parameter, tangent)
    rows = layer.kind.noise_rows(layer.parameter, activation, len(tangent) * tangent, True, DAMPING)
    return exact, elements.mT @ elements, rows.mT @ rows / rows.shape[1] ** 2


def trace(matrices):
    return float(jnp.trace(matrices, axis1=1, axis2=2).sum())


def cosine(a, b):
    return float(jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b))


def test_the_noise_is_that_of_examples(compared):
    for exact, _, used in compared:
        assert 0.7 < trace(used) / trace(exact) < 1.7
        assert cosine(used, exact) > 0.9


def test_that_of_positions_as_elements_of_the_set_would_be_too_small_where_neighbours_are_alike(compared):
    exact, elements, _ = compared[0]
    assert trace(elements) < 0.7 * trace(exact)
