"""Evaluation: optimizers against tuned Adam, on the same initialisations and the same batches."""
