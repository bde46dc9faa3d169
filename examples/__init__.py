"""Small models trained with a learned optimizer, one file per library. Run one as ``python -m examples.nnx_digits``."""
