"""Measurements by which this project is developed. Run one as ``python -m bench.meta_step``, from the checkout."""
