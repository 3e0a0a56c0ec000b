"""Steps over data: policies, optimizers, checkpoints, evaluation, and fitting a run to the machine. Knows no network."""
