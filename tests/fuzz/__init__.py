"""Damaged files and senseless flags: each is refused in one line, or makes no difference.

``mutations`` makes the damage, ``outcomes`` says what came of it, and one module for each kind of input says what is
damaged and how it is read. The suite takes a few hundred; ``make fuzz`` ten thousand.
"""
