"""Training loop, optimizers, checkpoints, and control by signals and timers."""
