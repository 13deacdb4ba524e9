"""The exact loss of a split: nats summed over every character, divided once by their number."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.corpus import Split
from minigpt.model import GPT
from minigpt.ranks import Ranks


@dataclass(frozen=True)
class Score:
    """How well characters were predicted.

    Attributes:
        nats: the sum of -ln p over the characters.
        count: how many characters were scored.
    """

    nats: float
    count: int

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


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Nats of ``targets`` (B, T) under ``logits`` (B, T, V): their mean, or with reduction "none" each, (B * T,)."""
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), reduction=reduction)


@torch.no_grad()
def score(
    model: GPT,
    split: Split,
    stride: int | None = None,
    max_chars: int | None = None,
    ranks: Ranks | None = None,
) -> Score:
    """Score every target of ``split`` once, without dropout.

    Args:
        model: on the device of the split; its mode is put back afterwards.
        split: what is scored.
        stride: characters between windows of the model's context; None for no overlap.
        max_chars: of a longer split, score about this many characters, spread evenly.
        ranks: processes that share the work; all get the whole result.
    """
    training = model.training
    model.eval()
    block_size = model.config.block_size
    totals = torch.zeros(2, dtype=torch.float64, device=split.tokens.device)
    share = (ranks.rank, ranks.world) if ranks else (0, 1)
    for part in split.sweep(block_size, stride or block_size, max_chars, share):
        nats = cross_entropy(model(part.ids), part.targets, reduction="none").view(part.targets.shape)
        counted = nats[:, part.skip :].double()
        totals += torch.stack([counted.sum(), torch.full_like(totals[0], counted.numel())])
    if ranks:
        ranks.sum(totals)
    model.train(training)
    nats_sum, count = totals.tolist()
    return Score(nats_sum, int(count))
