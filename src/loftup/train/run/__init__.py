"""A training run from its start to the weights: steps, checkpoints, validation, logs."""
