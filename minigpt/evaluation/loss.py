"""The exact loss of a split: nats summed over every character, divided once by their number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.data.dataset import EvalBatch, Split
from minigpt.model import GPT
from minigpt.runtime.distributed import SINGLE_PROCESS, ProcessGroup


@dataclass(frozen=True)
class Score:
    """How well characters were predicted.

    Attributes:
        nats: the sum of -ln p over the characters.
        count: how many characters were scored.
        of: how many the split has to score.
        windows: how many windows they were scored in.
        squares: over the windows, the sum of (their nats - loss * their characters)^2.
    """

    nats: float
    count: int
    of: int
    windows: int
    squares: float

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per character."""
        return self.nats / self.count

    @property
    def bits(self) -> float:
        """Bits per character: the loss over ln 2."""
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp(loss): how many equally likely characters it was like choosing from."""
        return math.exp(self.loss)

    @property
    def standard_error(self) -> float:
        """Of the loss, in nats, as an estimate for all text of the split's kind; nan for less than two windows.

        That of a ratio of sums over windows taken to be independent (Cochran 1977, eq. 6.4): characters within a
        window depend on each other as they may. It is too small where windows are shorter than what a text keeps to.
        """
        if self.windows < 2:
            return math.nan
        return math.sqrt(self.windows / (self.windows - 1) * self.squares) / self.count

    @property
    def sampling_error(self) -> float:
        """Of the loss, in nats, as an estimate for the split: 0 where all of it was scored.

        The standard error with the finite population correction. Windows spread evenly are taken as drawn at random,
        which seldom flatters them.
        """
        return 0.0 if self.count == self.of else self.standard_error * math.sqrt(1 - self.count / self.of)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Nats of ``targets`` (B, T) under ``logits`` (B, T, V): their mean, or with reduction "none" each, (B * T,)."""
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), reduction=reduction)


@torch.no_grad()
def score(
    model: GPT,
    split: Split,
    stride: int | None = None,
    max_chars: int | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    *,
    watch: Callable[[EvalBatch, Tensor, Tensor], None] | None = None,
) -> Score:
    """Score every target of ``split`` once, without dropout.

    Args:
        model: on the device of the split; its mode is put back afterwards.
        split: what is scored.
        stride: characters between windows of the model's context; None for no overlap.
        max_chars: of a longer split, score about this many characters, spread evenly.
        group: processes that share the work; all get the whole result.
        watch: told of each part that this process scores: windows, logits (B, T, V), and nats (B, T).
    """
    training = model.training
    model.eval()
    block_size = model.config.block_size
    totals = torch.zeros(6, dtype=torch.float64, device=split.device)
    parts = split.eval_batches(block_size, stride or block_size, max_chars, (group.rank, group.world_size))
    for part in group.pad_to_longest(parts):
        if part is None:
            model(torch.zeros(1, 1, dtype=torch.int64, device=totals.device))
            continue
        logits = model(part.ids)
        nats = cross_entropy(logits, part.targets, reduction="none").view(part.targets.shape)
        sums = nats[:, part.already_scored :].double().sum(1)
        lengths = torch.full_like(sums, nats.size(1) - part.already_scored)
        products = (sums, lengths, sums * sums, sums * lengths, lengths * lengths, torch.ones_like(sums))
        totals += torch.stack(products).sum(1)
        if watch:
            watch(part, logits, nats)
    group.all_reduce_sum(totals)
    model.train(training)
    nats_sum, count, nats_squared, mixed, count_squared, windows = totals.tolist()
    loss = nats_sum / count
    squares = max(0.0, nats_squared - 2 * loss * mixed + loss * loss * count_squared)
    return Score(nats_sum, int(count), len(split) - 1, int(windows), squares)
