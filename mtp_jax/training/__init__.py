"""The training loop and what it stands on: step, optimizer, checkpoints, metrics, FLOPs."""
