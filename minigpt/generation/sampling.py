"""Choice of the next character: filters of the distribution, draws from it, and stop strings."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minigpt.params import SamplingParams


def filter_probabilities(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Return the distribution that characters are drawn from, (B, V), each row up to a factor.

    Temperature (not 0), top_k, top_p and min_p are applied to logits (B, V) in this order. A temperature below 1 makes
    likely characters still likelier: it divides the logits, so their differences grow. Top-p keeps the smallest set of
    most likely characters whose probabilities sum to at least p (Holtzman et al. 2020); min-p is that of Nguyen et al.
    (2024).
    """
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.size(-1):
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1, torch.float64)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered * (before < sampling.top_p))
    if sampling.min_p:
        least = probabilities.amax(-1, keepdim=True) * sampling.min_p
        probabilities = probabilities * (probabilities >= least)
    return probabilities


def penalize(logits: Tensor, context: Tensor, penalty: float) -> Tensor:
    """Make the characters of the context (B, T) less likely (Keskar et al. 2019), for logits (B, V)."""
    seen = logits.gather(-1, context)
    return logits.scatter(-1, context, torch.where(seen > 0, seen / penalty, seen * penalty))


def sample(logits: Tensor, sampling: SamplingParams, uniforms: Tensor) -> Tensor:
    """Choose one character per row of logits (B, V): the quantiles ``uniforms`` (B,) in [0, 1) of the distributions."""
    if not sampling.temperature:
        return logits.argmax(-1)
    cumulative = filter_probabilities(logits, sampling).cumsum(-1)
    quantile = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, quantile, right=True).view(-1).clamp_max(logits.size(-1) - 1)


def draw_uniforms(seed: int, samples: int, length: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return numbers in [0, 1), (samples, length); row i depends on the seed and i alone."""
    rows = [np.random.Philox(key=[seed, sample]).random_raw(length) for sample in range(samples)]
    return np.stack(rows).astype(np.uint64).reshape(samples, length) / 2.0**64 * (1 - 2.0**-53)


class StopStrings:
    """A text as it is written, cut before the first of its stop strings; a possible start of one is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.held = ""
        self.ended = False

    def add(self, character: str) -> str:
        """Add a character and return the text that can be shown now."""
        if not self.stop:
            return character
        if self.ended:
            return ""
        self.held += character
        for stop in self.stop:
            if self.held.endswith(stop):
                self.ended = True
                return self.flush()[: -len(stop)]
        longest = max((n for stop in self.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        shown, self.held = self.held[: len(self.held) - longest], self.held[len(self.held) - longest :]
        return shown

    def flush(self) -> str:
        """Return the text that was held back."""
        held, self.held = self.held, ""
        return held
