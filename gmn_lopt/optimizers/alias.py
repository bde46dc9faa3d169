"""Directions as optimizers of their own, with nothing to learn, documented like optax's aliases."""

import jax
import jax.numpy as jnp
import optax

from gmn_lopt.factors.structure import GradientStructure
from gmn_lopt.optimizers.directions import Denoised
from gmn_lopt.optimizers.learned_optimizer import LearnedOptimizer, LearningRate, Scalar
from gmn_lopt.optimizers.leaves import Mask


def denoised(
    structure: GradientStructure,
    learning_rate: LearningRate,
    weight_decay: Scalar = 0.0,
    gamma: Scalar = 0.3,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum in the space of white activations, with the noise of the set taken out of its singular values.

    With :math:`M` a layer's momentum (decay 0.8), :math:`C = E_S[a a^T]` the second moment of its activations and
    :math:`N` the noise of the gradient in that space, read from the set of tangents, the step is

    .. math:: C^{-1} M (M^T C^{-1} M + E[N^T N])^{-1/2}

    scaled such that it changes the layer's outputs on the data by a root mean square of ``learning_rate``. The
    mathematics is in :mod:`gmn_lopt.optimizers.directions.denoising`. Kernels that are no such layer take Muon's step,
    all other parameters Adam's, times ``gamma``.

    Args:
        structure: the structure of the model, from :func:`gmn_lopt.analyze`.
        learning_rate: a number or an optax schedule; 0.01 to 0.05 for most models.
        weight_decay: decoupled, as AdamW's: ``learning_rate * weight_decay * params`` is subtracted as well.
        gamma: the learning rate of parameters that take Adam's step, relative to ``learning_rate``.
        mask: which parameters have weight decay, as in ``optax.adamw``: a tree of booleans like the parameters, a
            prefix of such, or a function from parameters to one. All, unless given.

    Returns:
        The transformation, whose ``update`` takes ``factors``, those of :func:`gmn_lopt.value_grad_and_factors`.

    Raises:
        ValueError: ``gamma`` is not positive; from ``update``, without factors.

    Example:
        >>> loss = lambda params, x: jnp.mean((jnp.tanh(x @ params["w"]) - 1.0) ** 2)
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
        >>> tx = gmn_lopt.denoised(gmn_lopt.analyze(loss, params, x), learning_rate=0.02)
        >>> value, grads, factors = gmn_lopt.value_grad_and_factors(loss)(params, x)
        >>> updates, state = tx.update(grads, tx.init(params), params, factors=factors)
        >>> params = optax.apply_updates(params, updates)

    References:
        The parts: K-FAC (Martens and Grosse 2015, arXiv:1503.05671), Muon (Jordan et al. 2024).
    """
    # optax.inject_hyperparams makes an array of each number.
    lopt = LearnedOptimizer(structure, Denoised() if isinstance(gamma, jax.Array) else Denoised(gamma))
    phi = lopt.init(jax.random.key(0))
    if isinstance(gamma, jax.Array):
        phi["direction"]["log_gamma"] = jnp.log(gamma)
    return lopt.optimizer(phi, learning_rate, weight_decay, mask=mask)
