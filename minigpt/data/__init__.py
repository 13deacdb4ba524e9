"""Text files to batches of token ids.

Reading and encoding need no torch; only `dataset` imports it.
May import: runtime, params, errors, files.
"""
