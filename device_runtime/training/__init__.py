"""Steps over data: trainer, checkpoints, evaluation, and fitting a run to the machine. Knows no network."""
