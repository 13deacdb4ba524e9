"""Measurements of a trained model: exact loss, its breakdown, n-gram baselines, copied text, charts.

The loss is also what training minimizes and selects by.
May import: tracking, export, quantize, model, ops, data, runtime, params, errors, files.
"""
