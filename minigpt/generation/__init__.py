"""New text from a trained model: sampling, incremental decoding on a CPU or a GPU, serving."""
