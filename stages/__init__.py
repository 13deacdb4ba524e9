"""The four stages of ``dvc.yaml``: verbs over the library. This is where each finds what another wrote."""

from pathlib import Path

PREPARED = Path("data/prepared")
MODEL = Path("models/gpt")
RESULTS = Path("results")
