"""Data pipeline from text files to batches of token ids.

Only `dataset` imports torch: reading and encoding a text do not need it.
"""
