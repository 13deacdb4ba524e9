"""A page that compares experiments: curves, the place of each difference in the text, and the characters behind it."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from minigpt.comparison.experiment import Experiment
from minigpt.comparison.tables import compare_pair, result_rows
from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.evaluation import paired
from minigpt.evaluation.character_losses import text_digest
from minigpt.files import PREPARED, write_atomically
from minigpt.page import html

FOLDER = Path(__file__).parent
MAX_EXPERIMENTS = 6
"""As many as the page has colors."""

SPLIT_FILES = (PREPARED / "val.npy", PREPARED / "tokenizer.json")


def write_page(chosen: Sequence[Experiment], output: Path) -> None:
    """Write the comparison of two to six experiments as one HTML file.

    Raises:
        UserError: there are too few or too many, one has no results, or two were not measured on the same text.
    """
    if not 2 <= len(chosen) <= MAX_EXPERIMENTS:
        raise UserError(f"--html: expected 2 to {MAX_EXPERIMENTS} experiments, got {len(chosen)}")
    if output.is_dir():
        raise UserError(f"--html: {output} is a folder; expected a file, such as {output / 'comparison.html'}")
    title = " and ".join(each.name for each in chosen)
    scripts = [html.FOLDER / "tools.js", html.FOLDER / "charts.js", FOLDER / "comparison.js"]
    styles = [FOLDER / "comparison.css"]
    content = html.fill(FOLDER / "comparison.html", f"minigpt: {title}", facts(chosen), scripts, styles=styles)
    write_atomically(output, content)


def facts(chosen: Sequence[Experiment]) -> dict[str, Any]:
    """Return the content of the page.

    A loss is the mean over a segment of the text, in thousandths of a nat: two bytes, little-endian, in base64.
    """
    results, params = result_rows(chosen)
    pairs = list(itertools.combinations(range(len(chosen)), 2))
    return {
        "names": [each.name for each in chosen],
        "results": results,
        "params": params,
        "pairs": [{"models": pair, "verdict": compare_pair(chosen[pair[0]], chosen[pair[1]])} for pair in pairs],
        "histories": [_history(each) for each in chosen],
        "batches": paired.BATCHES,
        "nats": [_pack(each.losses.nats / each.losses.lengths) for each in chosen],
        "text": _text(chosen[0]),
    }


def _history(experiment: Experiment) -> list[dict[str, Any]]:
    """Return the step and both losses of each evaluation."""
    names = ("step", "train_loss", "val_loss")
    rows = experiment.table("train/history.csv")
    return [
        {name: row[name] for name in names}
        for row in rows
        if all(isinstance(row.get(name), float) and math.isfinite(row[name]) for name in names)
    ]


def _pack(nats: np.ndarray[Any, Any]) -> str:
    thousandths = np.clip(np.rint(nats * 1000), 0, 2**16 - 1)
    return base64.b64encode(thousandths.astype("<u2").tobytes()).decode()


def _text(experiment: Experiment) -> str | None:
    """Return the characters that have a loss each; None if the prepared text is missing, or a loss is of several."""
    losses = experiment.losses
    tokens, tokenizer = (experiment.files.read(path) for path in SPLIT_FILES)
    if losses.segment > 1 or tokens is None or tokenizer is None:
        return None
    try:
        with TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.json").write_bytes(tokenizer)
            vocabulary = Tokenizer.load(Path(folder) / "tokenizer.json")
        ids = np.load(io.BytesIO(tokens), allow_pickle=False)
    except (UserError, OSError, ValueError):
        fix = f"`dvc checkout --force {PREPARED}` restores them"
        raise UserError(f"{experiment.name}: {SPLIT_FILES[0]} or {SPLIT_FILES[1]} is damaged; {fix}") from None
    # The workspace may have been prepared again, with another text.
    if text_digest(ids, vocabulary) != losses.text:
        return None
    return vocabulary.decode(ids[len(ids) - losses.characters :])
