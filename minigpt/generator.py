"""Writing text: one character after the other from the model's distribution, with a cache of what was read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import UserError
from minigpt.model import GPT, Cache
from minigpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Decoding:
    """How characters are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest character.
        top_k: only the k likeliest characters; 0 for all.
        top_p: only the likeliest characters that together reach this probability; 1 for all.
        seed: of the choices; sample i of a seed is the same whatever is written beside it.
        overflow: what happens when the context is full. ``slide`` reads the last block_size - 1 characters anew for
            every further one: each has the most context that the model can use, at the cost of a whole forward pass.
            ``hop`` reads the last half of the context anew and goes on with the cache.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    overflow: Literal["hop", "slide"] = "hop"


def filter_probabilities(logits: Tensor, decoding: Decoding) -> Tensor:
    """The distribution that characters are drawn from.

    Args:
        logits: (B, V).
        decoding: temperature (not 0), top_k and top_p are used.

    Returns:
        probabilities (B, V), each row of sum 1. Top-p keeps the smallest set of likeliest characters whose
        probabilities sum to at least p (Holtzman et al. 2020), after top-k.
    """
    logits = logits / decoding.temperature
    if 0 < decoding.top_k < logits.size(-1):
        least = logits.topk(decoding.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if decoding.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        kept = torch.zeros_like(ordered).scatter(-1, order, ordered * (before < decoding.top_p))
        probabilities = kept / kept.sum(-1, keepdim=True)
    return probabilities


def choose(logits: Tensor, decoding: Decoding, uniforms: Tensor) -> Tensor:
    """One character per row.

    Args:
        logits: (B, V).
        decoding: how to choose.
        uniforms: (B,) numbers in [0, 1): the quantiles of the distributions that are taken.

    Returns:
        ids (B,), int64.
    """
    if not decoding.temperature:
        return logits.argmax(-1)
    cumulative = filter_probabilities(logits.double(), decoding).cumsum(-1)
    quantile = (uniforms[:, None] * cumulative[:, -1:]).to(cumulative.dtype)
    return (cumulative <= quantile).sum(-1).clamp_max(logits.size(-1) - 1)


def uniforms(seed: int, samples: int, length: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Numbers in [0, 1), shape (samples, length); row i depends on the seed and i alone."""
    rows = [np.random.Philox(key=[seed, sample]).random_raw(length) for sample in range(samples)]
    return np.stack(rows).astype(np.uint64).reshape(samples, length) / 2.0**64 * (1 - 2.0**-53)


class Generator:
    """A model that writes.

    Args:
        model: in evaluation mode; its device and dtype are used.
        tokenizer: the model's.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def generate(
        self, prompt: str, max_new_tokens: int, decoding: Decoding, samples: int = 1, name: str = "the prompt"
    ) -> list[str]:
        """Continue ``prompt``.

        Args:
            prompt: at least one character, all in the vocabulary.
            max_new_tokens: characters to add.
            decoding: how they are chosen.
            samples: how many continuations, computed together.
            name: what error messages call the prompt.

        Returns:
            the prompt with its continuation, for each sample.

        Raises:
            UserError: the prompt is empty or has an unknown character.
        """
        written = list(self.stream(prompt, max_new_tokens, decoding, samples, name))
        return [prompt + "".join(characters) for characters in zip(*written, strict=True)] or [prompt] * samples

    @torch.inference_mode()
    def stream(
        self, prompt: str, max_new_tokens: int, decoding: Decoding, samples: int = 1, name: str = "the prompt"
    ) -> Iterator[list[str]]:
        """As :meth:`generate`, but each character as it is written: a list with one character per sample."""
        if not prompt:
            raise UserError(f"{name}: empty; the model needs at least one character to start from, such as a newline")
        context = self.model.config.block_size
        device = self.model.embedding.weight.device
        read = torch.from_numpy(self.tokenizer.encode(prompt, name).astype(np.int64)).to(device)
        history = read.repeat(samples, 1)[:, -context:]
        draws = torch.from_numpy(uniforms(decoding.seed, samples, max_new_tokens)).to(device)
        cache = self._cache(samples)
        fresh = history
        for step in range(max_new_tokens):
            if cache.length + fresh.size(1) > context:
                kept = context if decoding.overflow == "slide" else max(1, context // 2)
                cache, fresh = self._cache(samples), history[:, -kept:]
            logits = self.model(fresh, cache)[:, -1]
            ids = choose(logits, decoding, draws[:, step])
            fresh = ids[:, None]
            history = torch.cat((history, fresh), 1)[:, -context:]
            yield list(self.tokenizer.decode(ids.cpu().numpy()))

    def _cache(self, samples: int) -> Cache:
        return Cache(self.model.config, samples, self.model.embedding.weight, self.model.compute_dtype)
