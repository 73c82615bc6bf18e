"""Stage 2: the loop, its config, batches, losses, checkpoints and validation."""
