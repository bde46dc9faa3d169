"""Curvature from the gradients of a few examples (arXiv:2507.01649, section 7.1); see docs/curvature.md.

``data.py`` makes the data, ``models.py`` has the methods, ``train.py`` trains them, ``report.py`` writes what came out.
"""
