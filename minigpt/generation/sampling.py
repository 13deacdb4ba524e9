"""Choice of the next character: filters of the distribution, draws from it, and stop strings."""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt.errors import UserError
from minigpt.params import SamplingParams

CHUNK = 1 << 14
"""Characters for which memory is reserved, and random numbers are drawn, in advance."""


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
    """Choose one character per row of logits (B, V): the quantiles ``uniforms`` (B,) in [0, 1) of the distributions.

    Raises:
        UserError: a logit is infinite or not a number.
    """
    if not math.isfinite(logits.sum()):  # a quarter of the time of isfinite().all()
        raise UserError("the model computes logits that are not finite; its weights are damaged or too large")
    if not sampling.temperature:
        return logits.argmax(-1)
    cumulative = filter_probabilities(logits, sampling).cumsum(-1)
    quantile = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, quantile, right=True).view(-1).clamp_max(logits.size(-1) - 1)


def draw_uniforms(seed: int, samples: int, length: int) -> Iterator[NDArray[np.float64]]:
    """Yield arrays (samples, n) of numbers in [0, 1), of ``length`` columns in all, as they are needed.

    Row i depends on the seed and i alone.
    """
    rows = [np.random.Philox(key=[seed, sample]) for sample in range(samples)]
    for start in range(0, length, CHUNK):
        drawn = np.stack([row.random_raw(min(CHUNK, length - start)) for row in rows]).astype(np.uint64)
        yield drawn / 2.0**64 * (1 - 2.0**-53)


class StopStrings:
    """A text as it is written, cut before the stop string that ends first; a possible start of one is held back.

    Of several that end with the same character, the longest counts.

    Each stop string is matched in constant time per character, on average (Knuth, Morris and Pratt 1977).
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.ended = False
        self._held: deque[str] = deque()
        self._borders = [_borders(one) for one in stop]
        self._matched = [0] * len(stop)  # characters of each stop string that the text ends with

    def add(self, character: str) -> str:
        """Add a character and return the text that can be shown now."""
        if not self.stop:
            return character
        if self.ended:
            return ""
        self._held.append(character)
        for number, (stop, borders) in enumerate(zip(self.stop, self._borders, strict=True)):
            self._matched[number] = _extend(stop, borders, self._matched[number], character)
        complete = [len(stop) for stop, matched in zip(self.stop, self._matched, strict=True) if matched == len(stop)]
        if complete:
            self.ended = True
            return self.flush()[: -max(complete)]
        return "".join(self._held.popleft() for _ in range(len(self._held) - max(self._matched)))

    def flush(self) -> str:
        """Return the text that was held back."""
        held = "".join(self._held)
        self._held.clear()
        return held


def _borders(text: str) -> list[int]:
    """Return, for each number of characters of ``text``, the length of its longest proper prefix that is its suffix."""
    borders = [0, 0]
    for character in itertools.islice(text, 1, None):
        borders.append(_extend(text, borders, borders[-1], character))
    return borders


def _extend(text: str, borders: list[int], matched: int, character: str) -> int:
    """Return the length of the longest prefix of ``text`` that ends with ``character``, after ``matched`` did."""
    while matched and text[matched] != character:
        matched = borders[matched]
    return matched + (text[matched] == character)
