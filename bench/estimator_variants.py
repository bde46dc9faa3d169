"""The variants that bench/estimators.py compares: plain tables, a name and what differs from the paper's PES.

``stages`` is a sequence of stages as in ``meta_train.py --stages``, without meta-steps: they follow from the budget, of
which every stage gets an equal part. ``meta_clip`` is the largest norm of the meta-gradient, ``initial`` sets
coefficients such as ``{"alpha": 2.0}``, ``optimizer`` is one such as ``"ds+gmn"``; every other key is a keyword
argument of ``gmn_lopt.LearnedOptimizer``.
"""

from dataclasses import replace
from typing import Any

from gmn_lopt import GradMetaNetConfig

SMALL = GradMetaNetConfig(width=8, set_layers=1, neuron_layers=1, product_width=8, out_features=4)
# What GradMetaNet was found to add the most with (docs/meta_training.md), and changes of it.
WIDE = GradMetaNetConfig(width=16, set_layers=1, neuron_layers=1, product_width=16)
GMN_CHANGES: dict[str, dict[str, Any]] = {
    "no-averages": {"factor_decays": ()},
    "one-average": {"factor_decays": (0.9,)},
    "out-4": {"out_features": 4},
    "set-32": {"max_set_size": 32},
    "width-8": {"width": 8, "product_width": 8},
    "width-32": {"width": 32, "product_width": 32},
    "set-layers-2": {"set_layers": 2},
    "neuron-layers-0": {"neuron_layers": 0},
    "with-parameter": {"use_parameter": True},
}
FALLING = "truncated:K=25:schedule=cosine"
IMITATE = "truncated:K=25:imitation=1"
# The weight of imitation fades out: each stage gets a part of the budget.
GUIDED = f"{IMITATE},truncated:K=25:imitation=0.1,truncated:K=25"

# The best of each group of ablations.
COMBINED = {"stages": "nres:n=2:K=10:sigma=0.1", "decay": True, "bound": 1.0, "output_scale": 0.0}

ESTIMATORS: dict[str, dict[str, Any]] = {
    "pes": {},
    "es": {"stages": "es"},
    "nres": {"stages": "nres"},
    "truncated-10": {"stages": "truncated:K=10"},
    "truncated-25": {"stages": "truncated:K=25"},
    "truncated-50": {"stages": "truncated:K=50"},
    "truncated-100": {"stages": "truncated:K=100"},
    "truncated-25-pes": {"stages": "truncated:K=25,pes"},
}

# Each changes one thing of "nres", the estimator that came out best.
ABLATIONS: dict[str, dict[str, Any]] = {
    "pairs-2": {"stages": "nres:n=2"},
    "pairs-32": {"stages": "nres:n=32"},
    "window-10": {"stages": "nres:K=10"},
    "window-250": {"stages": "nres:K=250"},
    "sigma-0.003": {"stages": "nres:sigma=0.003"},
    "sigma-0.03": {"stages": "nres:sigma=0.03"},
    "sigma-0.1": {"stages": "nres:sigma=0.1"},
    "coefficient-sigma-0.1": {"stages": "nres:coefficient_sigma=0.1"},
    "coefficient-rate-0": {"stages": "nres:coefficient_rate=0"},
    "coefficient-rate-10": {"stages": "nres:coefficient_rate=10"},
    "shaping-ranks": {"stages": "nres:shaping=ranks"},
    "shaping-clip": {"stages": "nres:shaping=clip"},
    "meta-clip-0.1": {"stages": "nres", "meta_clip": 0.1},
    "meta-clip-none": {"stages": "nres", "meta_clip": 1e9},
    "adamw": {"stages": "nres:weight_decay=0.01"},
    "cosine": {"stages": "nres:schedule=cosine"},
    "final": {"stages": "nres:objective=final"},
    "ema-0.98": {"stages": "nres:ema=0.98"},
    # The optimizer.
    "base-adam": {"stages": "nres", "base": "adam"},
    "alpha-2": {"stages": "nres", "initial": {"alpha": 2.0, "beta": 2e-4}},
    "beta-1e-2": {"stages": "nres", "initial": {"beta": 1e-2}},
    "beta-1e-4": {"stages": "nres", "initial": {"beta": 1e-4}},
    "last-layer-0": {"stages": "nres", "output_scale": 0.0},
    "bound-1": {"stages": "nres", "bound": 1.0},
    "gate": {"stages": "nres", "gate": True},
    "decay": {"stages": "nres", "decay": True},
    "celo-normalized": {"stages": "nres", "optimizer": "celo", "rule": "normalized", "learning_rate": 0.01},
    "width-4": {"stages": "nres", "width": 4},
    "width-16": {"stages": "nres", "width": 16},
    "width-32": {"stages": "nres", "width": 32},
    "depth-1": {"stages": "nres", "hidden_layers": 1},
    "depth-2": {"stages": "nres", "hidden_layers": 2},
    "adapt": {"stages": "nres", "decay": True, "adapt": True},
    "combined": COMBINED,
    # Guidance by an expert, and what the set of gradients adds to it.
    "imitate": {"stages": IMITATE},
    "imitate-gmn": {"stages": IMITATE, "optimizer": "ds+gmn", "gradmetanet": SMALL},
    "imitate-truncated-25": {"stages": GUIDED},
    "imitate-truncated-25-gmn": {"stages": GUIDED, "optimizer": "ds+gmn", "gradmetanet": SMALL},
    # Features without a scale and without a clock, on the paper's rule.
    "features-celo": {"stages": "nres", "optimizer": "celo"},
    # GradMetaNet's size, how much of the set it reads, and what it remembers of it.
    "nres-gmn": {"stages": "nres", "optimizer": "ds+gmn", "gradmetanet": SMALL},
    "combined-gmn": COMBINED | {"optimizer": "ds+gmn", "gradmetanet": replace(SMALL, max_set_size=32)},
    "truncated-25-falling": {"stages": FALLING, "width": 32},
    "truncated-25-gmn": {"stages": FALLING, "optimizer": "ds+gmn", "gradmetanet": WIDE, "width": 32},
    "truncated-25-gmn-backbone-8": {"stages": FALLING, "optimizer": "ds+gmn", "gradmetanet": WIDE, "width": 8},
    **{
        f"truncated-25-gmn-{name}": {
            "stages": FALLING,
            "optimizer": "ds+gmn",
            "gradmetanet": replace(WIDE, **change),
            "width": 32,
        }
        for name, change in GMN_CHANGES.items()
    },
}
