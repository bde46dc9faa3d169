"""Other packages' tasks and optimizers as ours, and ours as theirs. None of them is imported here."""
