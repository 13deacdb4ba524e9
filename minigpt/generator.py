"""Writing text: one character after the other from the model's distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from minigpt import native
from minigpt.checkpoint import load_drafts, load_model
from minigpt.decoder import Cache, Weights, choose_weights
from minigpt.drafts import ORDERS, Drafts
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.tokenizer import Tokenizer

GUESSES = 3
"""Characters that are read along with the last one at most."""


@dataclass(frozen=True)
class Decoding:
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
    overflow: Literal["hop", "slide", "roll"] = "hop"


def filter_probabilities(logits: Tensor, decoding: Decoding) -> Tensor:
    """The distribution that characters are drawn from.

    Args:
        logits: (B, V).
        decoding: temperature (not 0), top_k, top_p and min_p are used, in this order.

    Returns:
        (B, V): probabilities, each row up to a factor. Top-p keeps the smallest set of likeliest characters whose
        probabilities sum to at least p (Holtzman et al. 2020); min-p is that of Nguyen et al. (2024).
    """
    if decoding.temperature != 1:
        logits = logits / decoding.temperature
    if 0 < decoding.top_k < logits.size(-1):
        least = logits.topk(decoding.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1, torch.float64)
    if decoding.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered * (before < decoding.top_p))
    if decoding.min_p:
        least = probabilities.amax(-1, keepdim=True) * decoding.min_p
        probabilities = probabilities * (probabilities >= least)
    return probabilities


def penalise(logits: Tensor, context: Tensor, penalty: float) -> Tensor:
    """Make the characters of the context (B, T) less likely (Keskar et al. 2019): logits (B, V) -> (B, V)."""
    seen = logits.gather(-1, context)
    return logits.scatter(-1, context, torch.where(seen > 0, seen / penalty, seen * penalty))


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
    cumulative = filter_probabilities(logits, decoding).cumsum(-1)
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


class Generator:
    """A model that writes.

    Args:
        model: in evaluation mode; its device is used.
        tokenizer: the model's.
        weights: what the model's weights are rounded to.
        drafts: what one sample alone is written faster with, on a CPU, by a decoder that is not compiled.
        compiled: whether the decoder is compiled, and ``characters`` how many will be written one after the other; as
            in :func:`minigpt.native.decoder`.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        weights: Weights = "float32",
        drafts: Drafts | None = None,
        *,
        compiled: native.Compile = "never",
        characters: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.decoder = native.decoder(model, weights, compiled, characters)
        # Compiled, a read of several characters takes nearly as many times as long: guesses cost more than they give.
        self.drafts = None if isinstance(self.decoder, native.NativeDecoder) else drafts
        self._kept: Cache | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device,
        dtype: str = "auto",
        *,
        compiled: native.Compile = "never",
        characters: int = 0,
    ) -> Generator:
        """The exported model in ``folder``, with weights for ``sample.dtype``; the rest as in the constructor.

        Raises:
            UserError: it is missing or damaged.
        """
        model, tokenizer = load_model(folder, device)
        weights = choose_weights(dtype, device)
        return cls(model, tokenizer, weights, load_drafts(folder), compiled=compiled, characters=characters)

    def generate(
        self, prompt: str, max_new_tokens: int, decoding: Decoding, samples: int = 1, name: str = "the prompt"
    ) -> list[str]:
        """Continue ``prompt``.

        Args:
            prompt: at least one character, all in the vocabulary.
            max_new_tokens: characters to add at most.
            decoding: how they are chosen.
            samples: how many continuations, computed together.
            name: what error messages call the prompt.

        Returns:
            the prompt with its continuation, for each sample.

        Raises:
            UserError: the prompt is empty or has an unknown character; or ``roll`` is asked of learned positions.
        """
        written = list(self.stream(prompt, max_new_tokens, decoding, samples, name))
        return [prompt + "".join(pieces) for pieces in zip(*written, strict=True)] or [prompt] * samples

    def stream(
        self, prompt: str, max_new_tokens: int, decoding: Decoding, samples: int = 1, name: str = "the prompt"
    ) -> Iterator[list[str]]:
        """As :meth:`generate`, but the text as it is written: a list with the next piece of each sample."""
        texts = [Stops(decoding.stop) for _ in range(samples)]
        for ids in self._ids(prompt, max_new_tokens, decoding, samples, name):
            characters = map(self.tokenizer.characters.__getitem__, ids)
            yield [text.add(character) for text, character in zip(texts, characters, strict=True)]
            if decoding.stop and all(text.ended for text in texts):
                return
        if decoding.stop:
            yield [text.rest() for text in texts]

    @torch.inference_mode()
    def _ids(self, prompt: str, count: int, decoding: Decoding, samples: int, name: str) -> Iterator[list[int]]:
        """The characters one after the other, each as a list of one id per sample."""
        if not prompt:
            raise UserError(f"{name}: empty; the model needs at least one character to start from, such as a newline")
        roll = decoding.overflow == "roll"
        if roll and self.model.config.positions == "learned":
            raise UserError("overflow: roll needs rotary positions, and this model's are learned; use hop or slide")
        context, device = self.model.config.block_size, self.model.embedding.weight.device
        read = torch.from_numpy(self.tokenizer.encode(prompt, name).astype(np.int64))
        draws = torch.from_numpy(uniforms(decoding.seed, samples, count)).to(device)
        text = torch.empty(samples, len(read) + count, dtype=torch.int64, device=device)
        text[:, : len(read)] = read
        drafts = self.drafts if samples == decoding.repetition_penalty == 1 and device.type == "cpu" else None
        last = read[-max(ORDERS) :].tolist()
        since, end = 0 if roll else max(0, len(read) - context), len(read)
        with self._empty_cache(samples, context + self.decoder.window if roll else context) as cache:
            while end < text.size(1):
                if not roll and end - since > context:
                    since = end - (context if decoding.overflow == "slide" else max(1, context // 2))
                    cache.clear()
                guesses: list[int] = []
                if drafts and since + cache.length == end - 1:
                    room = min(GUESSES, text.size(1) - end - 1, context if roll else since + context - end)
                    guesses = drafts.after(last, room)
                    text[0, end : end + len(guesses)] = torch.tensor(guesses, dtype=torch.int64)
                logits = self._read(text[:, since : end + len(guesses)], cache, 1 + len(guesses))
                if decoding.repetition_penalty != 1:
                    logits = penalise(logits, text[:, max(0, end - context) : end], decoding.repetition_penalty)
                place = end - len(read)
                ids = choose(logits, decoding, draws[:, place : place + 1 + len(guesses)].flatten()).view(samples, -1)
                columns = ids.T.tolist()
                new = columns[: 1 + leading(guesses, columns)]
                text[:, end : end + len(new)] = ids[:, : len(new)]
                cache.unread(len(columns) - len(new))
                end += len(new)
                last = [*last, *(column[0] for column in new)][-max(ORDERS) :]
                yield from new

    @contextmanager
    def _empty_cache(self, samples: int, slots: int) -> Iterator[Cache]:
        """A cache to fill: the one that was used last, if it fits, with the graph that a GPU has captured for it."""
        cache, self._kept = self._kept, None
        if cache is None or cache.ids.size(0) != samples or cache.slots != slots:
            cache = None  # its memory is free before the next is made
            cache = self.decoder.cache(samples, slots)
        cache.clear()
        try:
            yield cache
        finally:
            self._kept = cache

    def _read(self, text: Tensor, cache: Cache, predicted: int) -> Tensor:
        """Read what of ``text`` (B, T) is not in the cache, at most a context at a time.

        Returns:
            logits of what comes after each of the last ``predicted`` characters, (B * predicted, V).
        """
        for piece in text[:, cache.length :].split(self.model.config.block_size, 1):
            logits = self.decoder.read(piece, cache, min(predicted, piece.size(1)))
        return logits.flatten(0, 1)


def leading(guesses: Sequence[int], columns: Sequence[Sequence[int]]) -> int:
    """How many of the first guesses are what the first sample has there."""
    return next((n for n, guess in enumerate(guesses) if columns[n][0] != guess), len(guesses))
