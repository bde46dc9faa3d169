"""MLPs with everything known about them: parameters, loss, structure and factors, written out by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from gmn_lopt.structure import Factors, GradientStructure, Layer, Parameter, Site, SiteRef, Space


def init_mlp(widths, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    params = {}
    for i, (m, n) in enumerate(itertools.pairwise(widths)):
        params[f"bias_{i}"] = jnp.asarray(rng.normal(size=n) * 0.1, jnp.float32)
        params[f"kernel_{i}"] = jnp.asarray(rng.normal(size=(m, n)) * scale / np.sqrt(m), jnp.float32)
    return params


def mlp_structure(widths, batch=16, dtype="float32"):
    depth = len(widths) - 1
    spaces = [Space(w, 0 < i < depth) for i, w in enumerate(widths)]
    sites = [
        Site((i,), w, batch, (0,), i if i < depth else None, i - 1 if i > 0 else None) for i, w in enumerate(widths)
    ]
    biases = [
        Parameter(
            f"['bias_{i}']", (widths[i + 1],), dtype, (widths[i + 1],), (i + 1,), (SiteRef(i + 1, (0,)),), "factored"
        )
        for i in range(depth)
    ]
    kernels = [
        Parameter(
            f"['kernel_{i}']",
            (widths[i], widths[i + 1]),
            dtype,
            (widths[i], widths[i + 1]),
            (i, i + 1),
            (SiteRef(i, (0,)), SiteRef(i + 1, (1,))),
            "factored",
        )
        for i in range(depth)
    ]
    layers = [Layer(depth + i, i, i, i) for i in range(depth)]
    return GradientStructure(
        spaces=tuple(spaces),
        sites=tuple(sites),
        parameters=tuple(biases + kernels),
        layers=tuple(layers),
        treedef=jax.tree.structure(init_mlp(widths)),
        activation_shapes=tuple((batch, w) for w in widths[:-1]),
        tangent_shapes=tuple((batch, w) for w in widths[1:]),
    )


def mlp_loss(params, x, y, perturbations=None):
    """Softmax cross-entropy of a ReLU MLP; also its activations."""
    depth = len(params) // 2
    activations = []
    for i in range(depth):
        activations.append(x)
        x = x @ params[f"kernel_{i}"] + params[f"bias_{i}"]
        if perturbations is not None:
            x = x + perturbations[i]
        if i < depth - 1:
            x = jax.nn.relu(x)
    loss = -jnp.mean(jax.nn.log_softmax(x)[jnp.arange(x.shape[0]), y])
    return loss, tuple(activations)


def mlp_value_grad_and_factors(params, x, y):
    depth = len(params) // 2
    zeros = tuple(jnp.zeros((x.shape[0], params[f"bias_{i}"].shape[0])) for i in range(depth))
    (loss, activations), (grads, tangents) = jax.value_and_grad(mlp_loss, (0, 3), has_aux=True)(params, x, y, zeros)
    return loss, grads, Factors(activations, tangents)
