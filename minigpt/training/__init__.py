"""The training loop, its optimizers, its checkpoints and how it is interrupted.

May import: generation, evaluation and everything below them.
"""
