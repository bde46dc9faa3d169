"""What a gradient is made of: its rank-1 factors, and the structure of the model (arXiv:2507.01649, section 3)."""
