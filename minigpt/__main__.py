"""``python -m minigpt`` is the same as the command ``minigpt``."""

from minigpt.cli import run

if __name__ == "__main__":
    run()
