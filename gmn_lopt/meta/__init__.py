"""Meta-training: tasks, inner problems and estimators of the meta-gradient."""
