"""Runs in MLflow: a journal on the local disk first, then uploads to a tracking store. Never imports torch models."""
