"""Comparison of experiments: their results, the paired difference of their losses, tables and a page.

Never imports torch or MLflow, so that `minigpt compare` starts fast.
"""
