"""Learned optimizers as optax transformations (arXiv:2507.01649, section 6)."""
