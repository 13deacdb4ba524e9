"""Paired difference of two losses over the same text, with an interval that is honest for correlated text.

Two models that score the same characters find the same passages hard. The difference of their losses, character by
character, varies much less than the losses, so the paired difference is more precise than the difference of two
independent losses.

Neighboring characters depend on each other, so their number says little about the precision. The text is cut into
BATCHES long consecutive batches, whose means are nearly independent, and Student's distribution gives the interval
("batch means": Schmeiser 1982, Batch size effects in the analysis of simulation output, Operations Research 30).
Schmeiser found that 10 to 30 batches are enough: more gain little precision, and shorter ones are less independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minigpt.errors import UserError
from minigpt.evaluation.character_losses import CharacterLosses

BATCHES = 20
"""Consecutive parts of the text that count as independent."""

STUDENT_95 = 2.0930
"""Standard errors on either side in a 95 % interval: quantile of Student's distribution, BATCHES - 1 degrees."""

MIN_CHARACTERS = 50 * BATCHES
"""Fewest characters for an error."""


@dataclass(frozen=True)
class Estimate:
    """A mean in nats per character and its standard error, which is nan for a text that is too short."""

    value: float
    standard_error: float

    @property
    def margin(self) -> float:
        """Half of the width of the 95 % interval."""
        return STUDENT_95 * self.standard_error

    @property
    def significant(self) -> bool:
        """Whether the 95 % interval excludes 0."""
        return abs(self.value) > self.margin


def batch_means(nats: NDArray[np.floating], lengths: NDArray[np.integer]) -> Estimate:
    """Return the mean of sums over segments with these numbers of characters, with its standard error.

    The error is that of a ratio of sums over BATCHES batches of segments (Cochran 1977, eq. 6.4).
    """
    total = float(np.sum(nats, dtype=np.float64))
    characters = int(np.sum(lengths))
    mean = total / characters
    if characters < MIN_CHARACTERS or len(nats) < BATCHES:
        return Estimate(mean, math.nan)
    starts = np.arange(BATCHES) * len(nats) // BATCHES
    sums = np.add.reduceat(nats.astype(np.float64), starts)
    counts = np.add.reduceat(lengths, starts)
    squares = float(((sums - mean * counts) ** 2).sum())
    return Estimate(mean, math.sqrt(BATCHES / (BATCHES - 1) * squares) / characters)


def loss(losses: CharacterLosses) -> Estimate:
    """Return the loss of a model."""
    return batch_means(losses.nats, losses.lengths)


def difference(first: CharacterLosses, second: CharacterLosses) -> Estimate:
    """Return the loss of the second model minus that of the first: negative if the second is better.

    Raises:
        UserError: the models did not score the same characters.
    """
    if first.text != second.text or first.characters != second.characters:
        raise UserError(
            f"the validation texts differ ({first.characters:,} and {second.characters:,} characters), so their losses "
            "cannot be compared; use the same data.source, data.val_fraction, data.split and data.normalize"
        )
    if first.segment != second.segment:
        raise UserError(
            f"the losses have segments of {first.segment} and {second.segment} characters; "
            "run `dvc repro --force --single-item evaluate` for both"
        )
    return batch_means(second.nats.astype(np.float64) - first.nats, first.lengths)
