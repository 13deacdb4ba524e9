"""Training loop, optimizers, checkpoints, and control by signals and timers.

May import: evaluation and everything that evaluation may import.
"""
