"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How characters are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest character.
        top_k: only the k likeliest characters; 0 for all.
        top_p: only the likeliest characters that together reach this probability; 1 for all.
        min_p: only characters at least this many times as likely as the likeliest; 0 for all.
        repetition_penalty: what the logits of characters in the context are divided by, or multiplied by where they
            are negative; 1 for none.
        stop: texts; a sample ends before the first of them that it would write.
        seed: of the choices; sample i of a seed is the same whatever is written beside it, as far as sums are rounded
            alike (with float32 weights or a compiled decoder; else with bfloat16 or int8 not always).
        overflow: what happens when the context is full. ``slide`` reads the last block_size - 1 characters anew for
            every further one: each is predicted from the most context that the model was trained with, at the cost of
            a whole forward pass. ``hop`` reads the last half of the context anew and goes on from there. ``roll``, for
            rotary positions, goes on without end and reads nothing twice: a character looks at the keys and values of
            the last W (attention_window, or else block_size), as they were computed when those were read. What they
            know reaches back further than that, as in Transformer-XL (Dai et al. 2019).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    seed: int = 0
    overflow: Literal["reread", "slide", "roll"] = "reread"


def filter_probabilities(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """The distribution that characters are drawn from.

    Args:
        logits: (B, V).
        sampling: temperature (not 0), top_k, top_p and min_p are used, in this order.

    Returns:
        (B, V): probabilities, each row up to a factor. Top-p keeps the smallest set of likeliest characters whose
        probabilities sum to at least p (Holtzman et al. 2020); min-p is that of Nguyen et al. (2024).
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
    """Make the characters of the context (B, T) less likely (Keskar et al. 2019): logits (B, V) -> (B, V)."""
    seen = logits.gather(-1, context)
    return logits.scatter(-1, context, torch.where(seen > 0, seen / penalty, seen * penalty))


def choose(logits: Tensor, sampling: SamplingParams, uniforms: Tensor) -> Tensor:
    """One character per row.

    Args:
        logits: (B, V).
        sampling: how to choose.
        uniforms: (B,) numbers in [0, 1): the quantiles of the distributions that are taken.

    Returns:
        ids (B,), int64.
    """
    if not sampling.temperature:
        return logits.argmax(-1)
    cumulative = filter_probabilities(logits, sampling).cumsum(-1)
    quantile = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, quantile, right=True).view(-1).clamp_max(logits.size(-1) - 1)


def uniforms(seed: int, samples: int, length: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Numbers in [0, 1), shape (samples, length); row i depends on the seed and i alone."""
    rows = [np.random.Philox(key=[seed, sample]).random_raw(length) for sample in range(samples)]
    return np.stack(rows).astype(np.uint64).reshape(samples, length) / 2.0**64 * (1 - 2.0**-53)


class Stops:
    """A text as it is written, up to the first of the stop strings; what may be the start of one is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.held = ""
        self.ended = False

    def add(self, character: str) -> str:
        """Write a character; gives what can be shown now."""
        if not self.stop:
            return character
        if self.ended:
            return ""
        self.held += character
        for stop in self.stop:
            if self.held.endswith(stop):
                self.ended = True
                return self.rest()[: -len(stop)]
        longest = max((n for stop in self.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        shown, self.held = self.held[: len(self.held) - longest], self.held[len(self.held) - longest :]
        return shown

    def rest(self) -> str:
        """What was held back."""
        held, self.held = self.held, ""
        return held
