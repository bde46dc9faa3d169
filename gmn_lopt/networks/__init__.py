"""Networks on sets of gradients and on weights (arXiv:2507.01649, sections 4 and 5), which know no optimizers."""
