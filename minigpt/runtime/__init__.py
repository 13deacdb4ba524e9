"""The processor, the devices and the processes that a program runs on.

Nothing here knows what a GPT is.
May import: errors, files.
"""
