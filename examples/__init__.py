"""Small models trained with a learned optimizer, one file per library. Run one as ``python examples/nnx_digits.py``."""
