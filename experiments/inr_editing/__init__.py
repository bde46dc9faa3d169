"""Editing implicit neural representations (arXiv:2507.01649, section 7.3): see docs/inr_editing.md.

``siren`` is the network that shows an image, ``edits`` what is done to images, ``data`` fits networks to images,
``train`` trains editors of networks, and ``report`` makes the table and the picture.
"""
