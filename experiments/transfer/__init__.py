"""Does ``default``, untuned, do well on what it was never chosen by? Ten tasks that are in no mixture.

    python -m experiments.transfer --out runs/transfer

Each file makes tasks of one family; their data come with scikit-learn or Python, or are drawn. To add one of your own,
write its ``make`` function, and add a line to ``TASKS`` in ``__main__.py``.
"""
