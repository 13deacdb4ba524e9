"""Breakdown of a loss by position and by character, the confused characters, and the calibration."""

import math
import unicodedata
from typing import Any

import torch
from torch import Tensor

from minigpt.data.dataset import EvalBatch
from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.evaluation.loss import Score, window_sums

BINS = 15
"""Bins of equal width for the probabilities, as in Guo et al. (2017)."""

BINS_PER_OCTAVE = 2
"""Bins of context lengths between a length and its double."""

MAX_PAIRS = 20
"""Rows of the table of confusions."""

MERGE_AT = 1 << 20
"""Number of stored pairs of characters above which equal ones are merged."""

Row = dict[str, Any]


class Breakdown:
    """Tables over one pass of a split, accumulated on its device. Pass :meth:`add` to ``score`` as the callback."""

    def __init__(self, block_size: int, tokenizer: Tokenizer, device: torch.device | str) -> None:
        self.tokenizer = tokenizer
        self._positions = torch.zeros(2, block_size, dtype=torch.float64, device=device)  # nats, characters
        self._lengths = _bin_lengths(block_size).to(device)  # (T, bins), 1 for the bin of each position
        # Sums of window_sums for each bin, from which the standard errors follow.
        self._windows = torch.zeros(6, self._lengths.size(1), dtype=torch.float64, device=device)
        self._characters = torch.zeros(2, tokenizer.vocab_size, dtype=torch.float64, device=device)  # nats, characters
        self._bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)  # probabilities, correct, characters
        # Pairs as target * V + prediction, with their counts: a (V, V) matrix would be too large for some scripts.
        self._pairs: list[Tensor] = []
        self._counts: list[Tensor] = []

    def add(self, batch: EvalBatch, logits: Tensor, nats: Tensor) -> None:
        """Count the targets that no earlier batch has scored, given the logits (B, T, V) and -ln p of each (B, T)."""
        if not nats.isfinite().all():
            raise UserError("the loss of a character is not finite; the model's weights are damaged or too large")
        start, stop = batch.already_scored, nats.size(1)
        nats, logits, targets = nats[:, start:], logits[:, start:], batch.targets[:, start:]
        self._positions[0, start:stop] += nats.double().sum(0)
        self._positions[1, start:stop] += nats.size(0)
        sums = nats.double() @ self._lengths[start:stop]  # of each window, by bins of context lengths: (B, bins)
        self._windows += window_sums(sums, self._lengths[start:stop].sum(0).expand_as(sums))
        highest, predictions = logits.max(-1)
        target_logits = logits.gather(-1, targets[..., None])[..., 0]
        # The probability of the prediction, without a softmax: ln p = logit - logsumexp for each character.
        probabilities = (highest - target_logits - nats).exp().clamp(max=1).flatten().double()
        bins = (probabilities * BINS).long().clamp_(max=BINS - 1)
        correct, ones = (predictions == targets).flatten().double(), torch.ones_like(probabilities)
        self._bins.index_add_(1, bins, torch.stack((probabilities, correct, ones)))

        targets = targets.flatten()
        self._characters.index_add_(1, targets, torch.stack((nats.flatten().double(), ones)))
        self._pairs.append(targets * self.tokenizer.vocab_size + predictions.flatten())
        self._counts.append(torch.ones_like(targets))
        if sum(map(len, self._pairs)) > MERGE_AT:
            self._merge()

    def _merge(self) -> None:
        """Store each pair once, with its count."""
        pairs, inverse = torch.unique(torch.cat(self._pairs), return_inverse=True)
        counts = torch.zeros_like(pairs).index_add_(0, inverse, torch.cat(self._counts))
        self._pairs, self._counts = [pairs], [counts]

    @property
    def accuracy(self) -> float:
        """Fraction of characters to which the model gave the highest probability."""
        _, correct, counts = self._bins.sum(1).tolist()
        return correct / counts

    @property
    def calibration_error(self) -> float:
        """Expected calibration error (Guo et al. 2017, eq. 3) of the probability of the most likely character."""
        probabilities, correct, counts = self._bins
        return ((probabilities - correct).abs().sum() / counts.sum()).item()

    def positions(self) -> list[Row]:
        """Return the loss at each position of the context, counted from 1."""
        return [
            {"position": position, "loss": nats / count, "count": int(count)}
            for position, (nats, count) in enumerate(zip(*self._positions.tolist(), strict=True), 1)
            if count
        ]

    def context(self) -> list[Row]:
        """Return the loss by the length of the context, in bins of positions from ``first`` to ``last``.

        ``position`` is their geometric mean. The standard error is that of :class:`minigpt.evaluation.loss.Score`.
        """
        rows = []
        for number, sums in enumerate(self._windows.T.tolist()):
            score = Score(sums, int(sums[1]))
            if score.windows < 2:
                continue
            inside = self._lengths[:, number].nonzero().flatten() + 1
            first, last = int(inside[0]), int(inside[-1])
            row = {"first": first, "last": last, "position": math.sqrt(first * last), "loss": score.loss}
            rows.append({**row, "standard_error": score.standard_error, "count": score.count})
        return rows

    def characters(self) -> list[Row]:
        """Return the loss of each character that occurs, the most frequent first."""
        all_nats, counts = self._characters.tolist()
        total, rows = sum(all_nats), []
        for character, nats, count in zip(self.tokenizer.characters, all_nats, counts, strict=True):
            if count:
                names = {"character": label(character), "code_point": f"U+{ord(character):04X}"}
                share = nats / total if total else 0.0  # a model that is certain of every character has no loss
                rows.append({**names, "count": int(count), "loss": nats / count, "share": share})
        return sorted(rows, key=lambda row: -row["count"])

    def confusions(self) -> list[Row]:
        """Return the most frequent pairs of a target and another character that the model preferred to it."""
        self._merge()
        V = self.tokenizer.vocab_size
        pairs, counts = self._pairs[0], self._counts[0]
        wrong = pairs // V != pairs % V
        pairs, counts = pairs[wrong], counts[wrong]
        order = torch.argsort(counts, descending=True, stable=True)[:MAX_PAIRS]
        totals, rows = self._characters[1].tolist(), []
        for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True):
            target, guess = (label(self.tokenizer.characters[index]) for index in divmod(pair, V))
            names = {"pair": f"{target} → {guess}", "target": target, "guess": guess}
            rows.append({**names, "count": count, "share": count / totals[pair // V]})
        return rows

    def calibration(self) -> list[Row]:
        """Return the mean probability of the most likely character and its accuracy, for each bin with characters."""
        return [
            {"predicted": p / count, "observed": correct / count, "count": int(count)}
            for p, correct, count in zip(*self._bins.tolist(), strict=True)
            if count
        ]

    def tables(self) -> dict[str, list[Row]]:
        """Return the tables by name."""
        tables = (self.positions, self.context, self.characters, self.confusions, self.calibration)
        return {table.__name__: table() for table in tables}


def _bin_lengths(block_size: int) -> Tensor:
    """Return the bin of each of the positions 1 to ``block_size`` as a one-hot matrix, (block_size, bins)."""
    octaves = torch.arange(1, block_size + 1, dtype=torch.float64).log2()
    # The tolerance keeps a power of two from being rounded below the boundary of its bin.
    _, bins = torch.unique((octaves * BINS_PER_OCTAVE + 1e-9).long(), return_inverse=True)
    return torch.nn.functional.one_hot(bins).double()


def label(character: str) -> str:
    """Return a visible form: the character, a name or code point if it is blank, a dotted circle below a mark."""
    if name := {"\n": "newline", " ": "space", "\t": "tab"}.get(character):
        return name
    category = unicodedata.category(character)
    if category[0] in "CZ":
        return f"U+{ord(character):04X}"
    return "\N{DOTTED CIRCLE}" + character if category[0] == "M" else character
