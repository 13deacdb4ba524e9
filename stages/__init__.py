"""The four stages of ``dvc.yaml``, and the folders in which each finds the outputs of the others."""

from pathlib import Path

PREPARED = Path("data/prepared")
MODEL = Path("models/gpt")
RESULTS = Path("results")
