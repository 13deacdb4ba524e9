"""New text from a trained model: sampling, incremental decoding on a CPU or a GPU, serving.

May import: evaluation and everything that evaluation may import.
"""
