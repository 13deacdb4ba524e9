"""Writing text: one character after the other from the model's distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.export import load_drafts, load_model
from minigpt.generation import native
from minigpt.generation.decoder import KVCache
from minigpt.generation.drafts import ORDERS, Drafts
from minigpt.generation.sampling import SamplingParams, Stops, choose, penalize, uniforms
from minigpt.model import GPT
from minigpt.quantize import Weights, choose_weight_dtype

GUESSES = 3
"""Characters that are read along with the last one at most."""


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
        self._kept: KVCache | None = None

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
        weights = choose_weight_dtype(dtype, device)
        return cls(model, tokenizer, weights, load_drafts(folder), compiled=compiled, characters=characters)

    def generate(
        self, prompt: str, max_new_tokens: int, sampling: SamplingParams, samples: int = 1, name: str = "the prompt"
    ) -> list[str]:
        """Continue ``prompt``.

        Args:
            prompt: at least one character, all in the vocabulary.
            max_new_tokens: characters to add at most.
            sampling: how they are chosen.
            samples: how many continuations, computed together.
            name: what error messages call the prompt.

        Returns:
            the prompt with its continuation, for each sample.

        Raises:
            UserError: the prompt is empty or has an unknown character; or ``roll`` is asked of learned positions.
        """
        written = list(self.stream(prompt, max_new_tokens, sampling, samples, name))
        return [prompt + "".join(pieces) for pieces in zip(*written, strict=True)] or [prompt] * samples

    def stream(
        self, prompt: str, max_new_tokens: int, sampling: SamplingParams, samples: int = 1, name: str = "the prompt"
    ) -> Iterator[list[str]]:
        """As :meth:`generate`, but the text as it is written: a list with the next piece of each sample."""
        texts = [Stops(sampling.stop) for _ in range(samples)]
        for ids in self._ids(prompt, max_new_tokens, sampling, samples, name):
            characters = map(self.tokenizer.characters.__getitem__, ids)
            yield [text.add(character) for text, character in zip(texts, characters, strict=True)]
            if sampling.stop and all(text.ended for text in texts):
                return
        if sampling.stop:
            yield [text.rest() for text in texts]

    @torch.inference_mode()
    def _ids(self, prompt: str, count: int, sampling: SamplingParams, samples: int, name: str) -> Iterator[list[int]]:
        """The characters one after the other, each as a list of one id per sample."""
        if not prompt:
            raise UserError(f"{name}: empty; the model needs at least one character to start from, such as a newline")
        roll = sampling.overflow == "roll"
        if roll and self.model.config.positions == "learned":
            raise UserError("overflow: roll needs rotary positions, and this model's are learned; use hop or slide")
        context, device = self.model.config.block_size, self.model.embedding.weight.device
        read = torch.from_numpy(self.tokenizer.encode(prompt, name).astype(np.int64))
        draws = torch.from_numpy(uniforms(sampling.seed, samples, count)).to(device)
        text = torch.empty(samples, len(read) + count, dtype=torch.int64, device=device)
        text[:, : len(read)] = read
        drafts = self.drafts if samples == sampling.repetition_penalty == 1 and device.type == "cpu" else None
        last = read[-max(ORDERS) :].tolist()
        since, end = 0 if roll else max(0, len(read) - context), len(read)
        with self._empty_cache(samples, context + self.decoder.window if roll else context) as cache:
            while end < text.size(1):
                if not roll and end - since > context:
                    since = end - (context if sampling.overflow == "slide" else max(1, context // 2))
                    cache.clear()
                guesses: list[int] = []
                if drafts and since + cache.length == end - 1:
                    room = min(GUESSES, text.size(1) - end - 1, context if roll else since + context - end)
                    guesses = drafts.after(last, room)
                    text[0, end : end + len(guesses)] = torch.tensor(guesses, dtype=torch.int64)
                logits = self._read(text[:, since : end + len(guesses)], cache, 1 + len(guesses))
                if sampling.repetition_penalty != 1:
                    logits = penalize(logits, text[:, max(0, end - context) : end], sampling.repetition_penalty)
                place = end - len(read)
                ids = choose(logits, sampling, draws[:, place : place + 1 + len(guesses)].flatten()).view(samples, -1)
                columns = ids.T.tolist()
                new = columns[: 1 + leading(guesses, columns)]
                text[:, end : end + len(new)] = ids[:, : len(new)]
                cache.unread(len(columns) - len(new))
                end += len(new)
                last = [*last, *(column[0] for column in new)][-max(ORDERS) :]
                yield from new

    @contextmanager
    def _empty_cache(self, samples: int, slots: int) -> Iterator[KVCache]:
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

    def _read(self, text: Tensor, cache: KVCache, num_logits: int) -> Tensor:
        """Read what of ``text`` (B, T) is not in the cache, at most a context at a time.

        Returns:
            logits of what comes after each of the last ``predicted`` characters, (B * num_logits, V).
        """
        for piece in text[:, cache.length :].split(self.model.config.block_size, 1):
            logits = self.decoder.read(piece, cache, min(num_logits, piece.size(1)))
        return logits.flatten(0, 1)


def leading(guesses: Sequence[int], columns: Sequence[Sequence[int]]) -> int:
    """How many of the first guesses are what the first sample has there."""
    return next((n for n, guess in enumerate(guesses) if columns[n][0] != guess), len(guesses))
