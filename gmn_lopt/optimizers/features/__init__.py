"""What a per-parameter network reads."""
