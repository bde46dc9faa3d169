"""Files, errors and hardware."""
