"""The variants that bench/estimators.py compares: plain tables, a name and what differs from the paper's PES.

``stages`` is a sequence of stages as in ``meta_train.py --stages``, without meta-steps: they follow from the budget, of
which every stage gets an equal part. ``meta_clip`` is the largest norm of the meta-gradient, ``initial`` sets
coefficients such as ``{"alpha": 2.0}``, ``optimizer`` is one such as ``"ds+gmn"``; every other key is a keyword
argument of ``gmn_lopt.LearnedOptimizer``.
"""

from typing import Any

from gmn_lopt import GradMetaNetConfig

SMALL = GradMetaNetConfig(width=8, set_layers=1, neuron_layers=1, product_width=8, out_features=4)
IMITATE = "truncated:K=25:imitation=1"
# The weight of imitation fades out: each stage gets a part of the budget.
GUIDED = f"{IMITATE},truncated:K=25:imitation=0.1,truncated:K=25"

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

ABLATIONS: dict[str, dict[str, Any]] = {
    # The same inner steps in one meta-step, spent on pairs or on the window.
    "pairs-80": {"stages": "pes:n=80"},
    "window-250": {"stages": "pes:K=250"},
    "pairs-4": {"stages": "pes:n=4"},
    "sigma-0.003": {"stages": "pes:sigma=0.003"},
    "sigma-0.03": {"stages": "pes:sigma=0.03"},
    "coefficient-sigma-0.001": {"stages": "pes:coefficient_sigma=0.001"},
    "coefficient-sigma-0.1": {"stages": "pes:coefficient_sigma=0.1"},
    "coefficient-rate-10": {"stages": "pes:coefficient_rate=10"},
    "shaping-ranks": {"stages": "pes:shaping=ranks"},
    "shaping-clip": {"stages": "pes:shaping=clip"},
    "meta-clip-0.1": {"meta_clip": 0.1},
    "meta-clip-none": {"meta_clip": 1e9},
    "adamw": {"stages": "pes:weight_decay=0.01"},
    "cosine": {"stages": "pes:schedule=cosine"},
    "final": {"stages": "pes:objective=final"},
    "ema-0.98": {"stages": "pes:ema=0.98"},
    # Guidance by an expert, and what the set of gradients adds to it.
    "imitate": {"stages": IMITATE},
    "imitate-gmn": {"stages": IMITATE, "optimizer": "ds+gmn", "gradmetanet": SMALL},
    "imitate-truncated-25": {"stages": GUIDED},
    "imitate-truncated-25-gmn": {"stages": GUIDED, "optimizer": "ds+gmn", "gradmetanet": SMALL},
    "nres-gmn": {"stages": "nres", "optimizer": "ds+gmn", "gradmetanet": SMALL},
    "truncated-25-gmn": {"stages": "truncated:K=25", "optimizer": "ds+gmn", "gradmetanet": SMALL},
    "base-adam": {"base": "adam"},
    "alpha-2": {"initial": {"alpha": 2.0, "beta": 2e-4}},
    "width-8": {"width": 8},
    "width-16": {"width": 16},
}
