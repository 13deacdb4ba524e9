"""Runs in MLflow: a journal on the local disk first, then uploads to a tracking server.

Nothing here imports torch models.
May import: runtime, params, errors, files.
"""
