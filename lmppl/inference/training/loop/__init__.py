"""The training loop: batches, steps, looks at held-out observations, checkpoints and when it stops."""
