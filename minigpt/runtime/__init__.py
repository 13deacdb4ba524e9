"""CPU settings, compute devices, and the processes of a distributed job; independent of the model."""
