"""Measurements of a trained model: exact loss, its breakdown, n-gram baselines, copied text, charts.

Training minimizes the same loss and selects the best weights by it.
"""
