"""Exact loss of a split: the sum of nats over every character, divided once by their number."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.data.dataset import EvalBatch, Split
from minigpt.model import GPT, evaluation_mode
from minigpt.runtime.distributed import SINGLE_PROCESS, ProcessGroup

MAX_EXPONENT = math.log(sys.float_info.max)
"""Largest exponent of e whose power is a finite number."""


def window_sums(nats: Tensor, counts: Tensor) -> Tensor:
    """Return sums over windows from which the error of a loss follows, for :class:`Score`.

    Args:
        nats: sum of -ln p in each window, float64 (windows, ...).
        counts: characters of each window, of the same shape.

    Returns:
        the sums of n, c, n², n c, c² and of 1 for each window that has characters, (6, ...).
    """
    return torch.stack((nats, counts, nats * nats, nats * counts, counts * counts, (counts > 0).double())).sum(1)


@dataclass(frozen=True)
class Score:
    """A loss and its errors, from the sums of :func:`window_sums`. The split has ``total`` characters to score."""

    sums: Sequence[float]
    total: int

    @property
    def nats(self) -> float:
        """Sum of -ln p over the scored characters."""
        return self.sums[0]

    @property
    def count(self) -> int:
        """Scored characters."""
        return int(self.sums[1])

    @property
    def windows(self) -> int:
        """Windows that have a scored character."""
        return int(self.sums[5])

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
        _, _, nats_squared, mixed, count_squared, windows = self.sums
        # The sum of (n - loss c)² over the windows, expanded; rounding could leave a small negative number.
        squares = max(0.0, nats_squared - 2 * self.loss * mixed + self.loss**2 * count_squared)
        return math.sqrt(windows / (windows - 1) * squares) / self.count

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
    start: int = 0,
) -> Score:
    """Score every target of ``split`` once, without dropout. ``max_chars`` limits the score to evenly spaced windows.

    Windows of block_size start every ``stride`` characters; None: they do not overlap. The processes of ``group`` share
    the work, and each returns the same result. ``callback`` is called for each batch of this process with the windows,
    the logits (B, T, V) and the nats (B, T). The first ``start`` characters are left out.
    """
    block_size = model.config.block_size
    totals = torch.zeros(6, dtype=torch.float64, device=split.device)
    batches = split.eval_batches(block_size, stride or block_size, max_chars, (group.rank, group.world_size), start)
    with evaluation_mode(model):
        for batch in group.pad_to_longest(batches):
            if batch is None:  # a sharded model gathers its weights in forward, so every rank has to call it
                model(torch.zeros(1, 1, dtype=torch.int64, device=totals.device))
                continue
            logits = model(batch.ids)
            nats = cross_entropy(logits, batch.targets, reduction="none").view(batch.targets.shape)
            sums = nats[:, batch.already_scored :].double().sum(1)
            totals += window_sums(sums, torch.full_like(sums, nats.size(1) - batch.already_scored))
            if callback:
                callback(batch, logits, nats)
    group.all_reduce_sum(totals)
    return Score(totals.tolist(), len(split) - 1 - start)


class OverlapRecorder:
    """Recorder of the loss with overlapping windows. Pass :meth:`add` as the callback to a score without overlap.

    Windows start every ``stride`` characters, a divisor of block_size. Those that start at a multiple of block_size are
    the windows without overlap. They are computed once, and :meth:`finish` computes the others.
    """

    def __init__(self, block_size: int, stride: int) -> None:
        self.block_size, self.stride = block_size, stride
        self.nats, self.count = torch.zeros((), dtype=torch.float64), 0

    def add(self, _batch: EvalBatch, _logits: Tensor, nats: Tensor) -> None:
        """Add those of -ln p (B, T) with the longest context; all of the first window."""
        scored = nats[:, self.block_size - self.stride :] if self.count else nats
        self.nats = self.nats.to(scored.device) + scored.double().sum()  # is read at the end: a GPU need not wait
        self.count += scored.numel()

    def finish(self, model: GPT, split: Split) -> float:
        """Return the loss in nats per character."""
        for start in range(self.stride, self.block_size, self.stride):
            if len(split) - 1 > start:
                score(model, split, callback=self.add, start=start)
        return self.nats.item() / self.count
