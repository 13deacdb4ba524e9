"""Loss of a model on each file of a split with text of several files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.evaluation.paired import BATCHES, batch_means

FILE = "files.csv"


class FileRecorder:
    """Recorder of the loss of each file of a split, in reading order.

    Args:
        files: name, begin and end of the part of each file in the split, one after the other.
    """

    def __init__(self, files: Iterable[tuple[str, int, int]]) -> None:
        self.names = list[str]()
        batches, self._end, self._position = list[NDArray[np.int64]](), 0, 0
        for name, begin, end in files:
            # Target t is character t + 1 of the split: nothing predicts its first character.
            first, self._end = max(0, begin - 1), end - 1
            if first < self._end:
                self.names.append(name)
                batches.append(first + np.arange(BATCHES) * (self._end - first) // BATCHES)
        self._begins = np.concatenate([np.zeros(0, np.int64), *batches])  # of BATCHES parts of each file
        self._sums = np.zeros(len(self._begins))

    def extend(self, nats: NDArray[np.float64]) -> None:
        """Add -ln p of the next characters."""
        if not self.names:  # a text of one file
            return
        positions = np.arange(self._position, self._position + len(nats))
        batches = np.searchsorted(self._begins, positions, "right") - 1
        self._sums[batches[0] : batches[-1] + 1] += np.bincount(batches - batches[0], nats)
        self._position += len(nats)

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Return a row for each file: its scored characters, their loss and its standard error in nats per character.

        The error is empty for a part that is too short for one. A split with text of a single file has no rows.
        """
        if len(self.names) < 2:
            return []
        lengths = np.diff(self._begins, append=self._end).reshape(-1, BATCHES)
        rows = []
        for name, sums, counts in zip(self.names, self._sums.reshape(-1, BATCHES), lengths, strict=True):
            estimate = batch_means(sums, counts)
            error = "" if math.isnan(estimate.standard_error) else estimate.standard_error
            row = {"file": name, "split": split, "characters": int(counts.sum()), "loss": estimate.value}
            rows.append(row | {"standard_error": error})
        return rows
