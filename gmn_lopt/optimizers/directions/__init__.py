"""The directions that the learned part of an update is added to."""
