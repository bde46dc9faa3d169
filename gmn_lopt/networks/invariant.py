"""GradMetaNet or GradMetaNet++ with one vector for the whole model as its output."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmn_lopt.factors.structure import Factors, GradientStructure
from gmn_lopt.networks.gradmetanet import GradMetaNetConfig
from gmn_lopt.networks.gradmetanet_pp import GradMetaNetPlusPlusConfig


class InvariantGradMetaNet(nn.Module):
    """The mean of the features of all neurons, and a linear map: ``(E_N h) M + c``.

    It comes in place of step 5 of :mod:`gmn_lopt.networks.gradmetanet`. Where the trunk does not pool over the set, as
    GradMetaNet++'s, the mean is over the set as well.

    Attributes:
        structure: the structure of the model whose factors are read.
        config: the architecture; ``out_features`` is the number of outputs.
        channels: number of channels of each activation and each tangent.
        normalize: whether they are normalised, as for :class:`~gmn_lopt.networks.gradmetanet.GradMetaNet`.

    Example:
        >>> import gmn_lopt, jax
        >>> structure = gmn_lopt.analyze(lambda w, x: jnp.sum((x @ w) ** 2), jnp.ones((2, 3)), jnp.ones((4, 2)))
        >>> module = InvariantGradMetaNet(structure, GradMetaNetConfig(out_features=5))
        >>> factors = Factors((jnp.ones((1, 4, 2)),), (jnp.ones((1, 4, 3)),))
        >>> module.apply(module.init(jax.random.key(0), factors), factors).shape
        (5,)
    """

    structure: GradientStructure
    config: GradMetaNetConfig | GradMetaNetPlusPlusConfig = GradMetaNetConfig()
    channels: int = 1
    normalize: bool = True

    @nn.compact
    def __call__(self, factors: Factors) -> Float[Array, "out"]:
        """Compute the vector (``factors`` as for :class:`~gmn_lopt.networks.gradmetanet.GradMetaNet`)."""
        trunk: Any = self.config.trunk
        neurons = trunk(self.structure, self.config, self.channels, self.normalize, name="trunk")(factors)
        sites = [x if x.ndim == 2 else x.mean(0) for x in neurons]
        return nn.Dense(self.config.out_features, name="head")(jnp.concatenate(sites).mean(0))
