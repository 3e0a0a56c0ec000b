"""From data files to batches of arrays."""
