"""Ready-made configurations: copy one to make your own, and give it a task and a directory.

Example:
    >>> import dataclasses, pathlib
    >>> config = dataclasses.replace(BEST, task="digits_mlp", out=pathlib.Path("runs/digits"))
    >>> config.stages[0].meta_steps
    40
"""

from pathlib import Path

from gmn_lopt.meta.config import Config
from gmn_lopt.meta.stages import Stage
from gmn_lopt.optimizers.recipes import RECIPES

# What was found to learn fastest, a matter of minutes: small networks on the denoised direction, a few steps of
# back-propagation, and coefficients that stay where they start.
BEST = Config(
    task="",
    out=Path(),
    optimizer=RECIPES["denoised+ds+gmn"],
    stages=(
        Stage(
            estimator="truncated",
            meta_steps=40,
            learning_rate=3e-3,
            schedule="cosine",
            truncation=100,
            pairs=4,
            clip=0.1,
            coefficient_rate=0.0,
        ),
    ),
    checkpoint_every=10,
)

# The paper's protocol (arXiv:2507.01649, section 6): one stage of PES, Adam at 1e-4 for 50,000 meta-steps.
PAPER = Config(
    task="",
    out=Path(),
    optimizer=RECIPES["ds+gmn"],
    stages=(Stage(estimator="pes", meta_steps=50_000, learning_rate=1e-4, truncation=50, pairs=16, sigma=0.01),),
)

PRESETS = {"best": BEST, "paper": PAPER}
