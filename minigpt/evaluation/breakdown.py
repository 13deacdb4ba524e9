"""Where a model's loss comes from, by place and by character, and how far its probabilities can be trusted."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt.data.dataset import EvalBatch
from minigpt.data.tokenizer import Tokenizer
from minigpt.files import write_csv

BINS = 15
"""Bins of equal width that probabilities are sorted into, as many as Guo et al. (2017) take."""

PAIRS = 20
"""Confused pairs that are listed."""

HELD = 1 << 20
"""Pairs of characters held before equal ones are counted."""

Row = dict[str, Any]

NAMED = {"\n": "newline", " ": "space", "\t": "tab"}


class Breakdown:
    """Tables of one pass over a split, gathered on its device: give :meth:`add` to ``score`` as its ``watch``.

    Args:
        block_size: the model's context T.
        tokenizer: of the model, with V characters.
        device: of the split.
    """

    def __init__(self, block_size: int, tokenizer: Tokenizer, device: torch.device | str) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokenizer = tokenizer
        self._positions = zeros(2, block_size)  # nats, characters
        self._characters = zeros(2, tokenizer.vocab_size)  # nats, characters
        self._bins = zeros(3, BINS)  # probabilities, hits, characters
        self._pairs: list[Tensor] = []  # target * V + guess
        self._counts: list[Tensor] = []  # of each pair

    def add(self, part: EvalBatch, logits: Tensor, nats: Tensor) -> None:
        """Count the targets of ``part`` that no earlier part had.

        Args:
            part: windows (B, T).
            logits: of the next characters, (B, T, V).
            nats: -ln p of the targets, (B, T).
        """
        stop = nats.size(1)
        nats, logits, targets = (
            nats[:, part.already_scored :],
            logits[:, part.already_scored :],
            part.targets[:, part.already_scored :],
        )
        self._positions[0, part.already_scored : stop] += nats.double().sum(0)
        self._positions[1, part.already_scored : stop] += nats.size(0)

        highest, guesses = logits.max(-1)
        chosen = logits.gather(-1, targets[..., None])[..., 0]
        probabilities = (highest - chosen - nats).exp().clamp(max=1).flatten().double()
        bins = (probabilities * BINS).long().clamp_(max=BINS - 1)
        hits, ones = (guesses == targets).flatten().double(), torch.ones_like(probabilities)
        self._bins.index_add_(1, bins, torch.stack((probabilities, hits, ones)))

        targets = targets.flatten()
        self._characters.index_add_(1, targets, torch.stack((nats.flatten().double(), ones)))
        self._pairs.append(targets * self.tokenizer.vocab_size + guesses.flatten())
        self._counts.append(torch.ones_like(targets))
        if sum(map(len, self._pairs)) > HELD:
            self._merge()

    def _merge(self) -> None:
        """Hold each pair once, with its count."""
        pairs, inverse = torch.unique(torch.cat(self._pairs), return_inverse=True)
        counts = torch.zeros_like(pairs).index_add_(0, inverse, torch.cat(self._counts))
        self._pairs, self._counts = [pairs], [counts]

    @property
    def accuracy(self) -> float:
        """The share of characters that were the likeliest."""
        _, hits, counts = self._bins.sum(1).tolist()
        return hits / counts

    @property
    def calibration_error(self) -> float:
        """The expected calibration error (Guo et al. 2017, eq. 3) of the likeliest characters' probabilities."""
        probabilities, hits, counts = self._bins
        return ((probabilities - hits).abs().sum() / counts.sum()).item()

    def positions(self) -> list[Row]:
        """The loss of the targets at each position of the context, from the first."""
        rows = zip(*self._positions.tolist(), strict=True)
        return [
            {"position": position, "loss": nats / count, "count": int(count)}
            for position, (nats, count) in enumerate(rows, 1)
            if count
        ]

    def characters(self) -> list[Row]:
        """The loss of each character that occurs, the most frequent first."""
        nats, counts = self._characters.tolist()
        order = sorted((index for index, count in enumerate(counts) if count), key=lambda index: -counts[index])
        return [
            {
                "character": label(self.tokenizer.characters[index]),
                "code_point": f"U+{ord(self.tokenizer.characters[index]):04X}",
                "count": int(counts[index]),
                "loss": nats[index] / counts[index],
                "share": nats[index] / sum(nats),
            }
            for index in order
        ]

    def confusions(self) -> list[Row]:
        """The pairs of a character and another that was thought likelier than any, the most frequent first."""
        self._merge()
        V = self.tokenizer.vocab_size
        pairs, counts = self._pairs[0], self._counts[0]
        wrong = pairs // V != pairs % V
        pairs, counts = pairs[wrong], counts[wrong]
        order = torch.argsort(counts, descending=True, stable=True)[:PAIRS]
        totals = self._characters[1].tolist()
        rows = []
        for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True):
            target, guess = label(self.tokenizer.characters[pair // V]), label(self.tokenizer.characters[pair % V])
            share = count / totals[pair // V]
            rows.append(
                {"pair": f"{target} as {guess}", "target": target, "guess": guess, "count": count, "share": share}
            )
        return rows

    def calibration(self) -> list[Row]:
        """In each bin that has any: the mean probability of the likeliest character, and how often it was right."""
        return [
            {
                "predicted": probability / count,
                "observed": hits / count,
                "ideal": probability / count,
                "count": int(count),
            }
            for probability, hits, count in zip(*self._bins.tolist(), strict=True)
            if count
        ]

    def write(self, folder: Path) -> None:
        """Write each table as CSV: positions, characters, confusions, calibration."""
        for table in (self.positions, self.characters, self.confusions, self.calibration):
            write_csv(folder / f"{table.__name__}.csv", table())


def label(character: str) -> str:
    """A character for tables and pictures: itself, on a dotted circle if it needs one, or a name if it is unseen."""
    if character in NAMED:
        return NAMED[character]
    category = unicodedata.category(character)
    if category[0] in "CZ":
        return f"U+{ord(character):04X}"
    return "\N{DOTTED CIRCLE}" + character if category[0] == "M" else character
