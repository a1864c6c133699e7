"""The training loop: batches, steps, evaluations, checkpoints, and when it stops."""
