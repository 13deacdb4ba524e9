"""Exact loss of a split: the sum of nats over every character, divided once by their number."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.data.dataset import EvalBatch, Split
from minigpt.model import GPT
from minigpt.runtime.distributed import SINGLE_PROCESS, ProcessGroup

MAX_EXPONENT = math.log(sys.float_info.max)
"""Largest exponent of e whose power is a finite number."""


@dataclass(frozen=True)
class Score:
    """Sums from which the loss and its errors follow.

    ``nats`` is the sum of -ln p over the ``count`` scored characters, which are in ``windows`` windows. The split has
    ``total`` characters to score. ``squares`` is the sum over the windows of (nats - loss * characters)^2.
    """

    nats: float
    count: int
    total: int
    windows: int
    squares: float

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per character."""
        return self.nats / self.count

    @property
    def bits(self) -> float:
        """Bits per character: the loss divided by ln 2."""
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp(loss), the number of equally likely characters with the same loss; infinite above a loss of 709 nats."""
        return math.inf if self.loss > MAX_EXPONENT else math.exp(self.loss)

    @property
    def standard_error(self) -> float:
        """Standard error of the loss in nats, as an estimate for all text like the split; nan below two windows.

        This is the error of a ratio of sums over independent windows (Cochran 1977, eq. 6.4). Characters within a
        window may depend on each other. The error is too small if the text has dependencies longer than a window, so
        :mod:`minigpt.evaluation.paired` has another one for results that are compared.
        """
        if self.windows < 2:
            return math.nan
        return math.sqrt(self.windows / (self.windows - 1) * self.squares) / self.count

    @property
    def sampling_error(self) -> float:
        """Standard error of the loss in nats, as an estimate for the whole split; 0 if all of it was scored.

        It has the finite population correction, and treats evenly spaced windows as a random sample: rarely too small.
        """
        return 0.0 if self.count == self.total else self.standard_error * math.sqrt(1 - self.count / self.total)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the nats of ``targets`` (B, T) under ``logits`` (B, T, V): the mean, or (B * T,) with reduction "none"."""
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), reduction=reduction)


@torch.no_grad()
def score(
    model: GPT,
    split: Split,
    stride: int | None = None,
    max_chars: int | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    *,
    callback: Callable[[EvalBatch, Tensor, Tensor], None] | None = None,
) -> Score:
    """Score every target of ``split`` once, without dropout. ``max_chars`` limits the score to evenly spaced windows.

    Windows of block_size start every ``stride`` characters; None: they do not overlap. The processes of ``group`` share
    the work, and each returns the same result. ``callback`` is called for each batch of this process with the windows,
    the logits (B, T, V) and the nats (B, T). The mode of the model, training or evaluation, is restored afterwards.
    """
    training = model.training
    model.eval()
    block_size = model.config.block_size
    totals = torch.zeros(6, dtype=torch.float64, device=split.device)
    batches = split.eval_batches(block_size, stride or block_size, max_chars, (group.rank, group.world_size))
    for batch in group.pad_to_longest(batches):
        if batch is None:  # a sharded model gathers its weights in forward, so every rank has to call it
            model(torch.zeros(1, 1, dtype=torch.int64, device=totals.device))
            continue
        logits = model(batch.ids)
        nats = cross_entropy(logits, batch.targets, reduction="none").view(batch.targets.shape)
        sums = nats[:, batch.already_scored :].double().sum(1)
        lengths = torch.full_like(sums, nats.size(1) - batch.already_scored)
        products = (sums, lengths, sums * sums, sums * lengths, lengths * lengths, torch.ones_like(sums))
        totals += torch.stack(products).sum(1)
        if callback:
            callback(batch, logits, nats)
    group.all_reduce_sum(totals)
    model.train(training)
    nats_sum, count, nats_squared, mixed, count_squared, windows = totals.tolist()
    loss = nats_sum / count
    # Expands the square of Score.squares; rounding could leave a small negative number.
    squares = max(0.0, nats_squared - 2 * loss * mixed + loss * loss * count_squared)
    return Score(nats_sum, int(count), len(split) - 1, int(windows), squares)
