"""CPU settings, compute devices, and the processes of a distributed job.

Nothing here depends on the model.
May import: errors, files.
"""
