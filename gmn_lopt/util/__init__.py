"""Files, errors, progress, hardware and threads."""
