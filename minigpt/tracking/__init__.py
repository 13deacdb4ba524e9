"""Runs in MLflow: a journal on the local disk first, then uploads to a tracking store.

Imports runtime, params, errors and files; never the data or torch models.
"""
