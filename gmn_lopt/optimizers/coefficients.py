"""The scalar coefficients of the update rules, and what they start at. They are learned as logarithms."""

COEFFICIENTS = ("alpha", "beta", "gamma", "tau", "power", "gain", "overshoot", "one_minus_mu")
# Adam's direction has entries of about one where a gradient's are small, so its own learning rate is small; beta is
# larger by as much, so that the network's part has the same step size in both.
INITIAL = {
    "momentum": {"alpha": 0.1, "beta": 1e-3, "one_minus_mu": 0.1},
    "adam": {"alpha": 1e-3, "beta": 0.1},
    "muon": {"alpha": 0.03, "beta": 0.01, "gamma": 0.3},
    "denoised": {"alpha": 0.02, "beta": 0.01, "gamma": 0.3},
}
NORMALIZED_BETA = 0.1
DECAY = {"tau": 30.0, "power": 1.0}
ADAPT = {"gain": 0.02, "overshoot": 0.02}


def initial_coefficients(
    base: str, *, normalized: bool, orthogonalize: bool, decay: bool, adapt: bool, network: bool
) -> dict[str, float]:
    """The coefficients that a rule has, and what each starts at.

    Args:
        base: the base direction.
        normalized: whether the rule is the normalised one, of which the user sets the step size.
        orthogonalize, decay, adapt: the settings of :class:`gmn_lopt.LearnedOptimizer`.
        network: whether there is a backbone, which ``beta`` weighs.
    """
    start = dict(INITIAL[base])
    if normalized:
        del start["alpha"]
        start["beta"] = NORMALIZED_BETA
        if orthogonalize:
            start["gamma"] = INITIAL["muon"]["gamma"]
    start |= (DECAY if decay else {}) | (ADAPT if adapt else {})
    if not network:
        del start["beta"]
    return start
