"""Text generation: one character after the other from the distribution that the model predicts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from minigpt.cache import KVCache
from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.export import load_model
from minigpt.generation.cuda_graph import GraphedGPT
from minigpt.generation.native import NativeGPT, compile_model
from minigpt.generation.sampling import StopStrings, draw_uniforms, penalize, sample
from minigpt.model import GPT
from minigpt.params import Compile, SamplingParams
from minigpt.quantize import WeightDtype, choose_weight_dtype, quantize


class Generator:
    """A trained model that writes text.

    The model is in evaluation mode, on the device to use. ``compile`` and ``characters``, the number to write one after
    the other, are those of :func:`minigpt.generation.native.compile_model`.

    Sample i of a seed is the same whatever is written in the same batch, as long as sums are rounded alike: always with
    a compiled decoder, nearly always with float32 weights, and not always with bfloat16 or int8 weights.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        dtype: WeightDtype = "float32",
        *,
        compile: Compile = "never",  # noqa: A002 - the name of the param
        characters: int = 0,
    ) -> None:
        self.config = model.config
        self.device = model.embedding.weight.device
        self.tokenizer = tokenizer
        self.decoder: GPT | GraphedGPT | NativeGPT
        if native := compile_model(model, dtype, compile, characters):
            self.decoder = native
        else:
            quantized = quantize(model, dtype)
            self.decoder = GraphedGPT(quantized) if self.device.type == "cuda" else quantized
        self._last_cache: KVCache | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device,
        dtype: str = "auto",
        *,
        compile: Compile = "auto",  # noqa: A002 - the name of the param
        characters: int = 0,
    ) -> Generator:
        """Read the exported model in ``folder``, with weights for ``sample.dtype``, or raise a UserError."""
        weights = choose_weight_dtype(dtype, device)
        return cls(*load_model(folder, device), weights, compile=compile, characters=characters)

    def generate(self, prompt: str, sampling: SamplingParams, samples: int = 1, name: str = "the prompt") -> list[str]:
        """Return the prompt with its continuation, for each of ``samples`` that are computed together.

        Raises:
            UserError: the prompt, which the message calls ``name``, is empty or has an unknown character, or the model
                cannot do ``overflow``.
        """
        pieces = list(self.stream(prompt, sampling, samples, name))
        return [prompt + "".join(written) for written in zip(*pieces, strict=True)] or [prompt] * samples

    def stream(
        self, prompt: str, sampling: SamplingParams, samples: int = 1, name: str = "the prompt"
    ) -> Iterator[list[str]]:
        """Yield the text of :meth:`generate` as it is written: a list with the next piece of each sample.

        Pieces may be empty: at a possible start of a stop string, and after each part of a long prompt.
        """
        stop = [self.tokenizer.normalized(one) for one in sampling.stop]  # as the text that the model writes
        texts = [StopStrings(stop) for _ in range(samples)]
        for ids in self._ids(prompt, sampling, samples, name):
            if not ids:
                yield [""] * samples
                continue
            characters = map(self.tokenizer.characters.__getitem__, ids)
            yield [text.add(character) for text, character in zip(texts, characters, strict=True)]
            if sampling.stop and all(text.ended for text in texts):
                return
        if sampling.stop:
            yield [text.flush() for text in texts]

    @torch.inference_mode()
    def _ids(self, prompt: str, sampling: SamplingParams, samples: int, name: str) -> Iterator[list[int]]:
        """Yield the new characters, each as a list of one id per sample; an empty list after each part of the prompt.

        The cache holds the characters from ``start`` on. When the context is full, ``reread`` starts again with its
        last half, and ``slide`` with all but its first character, for every further one: the most context that the
        model was trained with, at the cost of a whole forward pass. ``roll``, for rotary positions, never starts again:
        a character attends to the last W (``ModelParams.window``) as they were computed when they were read, so that
        information reaches further back than W, as in Transformer-XL (Dai et al. 2019).
        """
        if not prompt:
            raise UserError(f"{name}: empty; the model needs at least one character of its vocabulary to continue")
        roll, context = sampling.overflow == "roll", self.config.block_size
        if roll and self.config.positions == "learned":
            raise UserError("overflow: roll needs rotary positions, but this model has learned ones; use reread")
        prompt_ids = torch.from_numpy(self.tokenizer.encode(prompt, name).astype(np.int64))
        text, end = prompt_ids.to(self.device).expand(samples, -1), len(prompt_ids)
        start = 0 if roll else max(0, end - context)
        with self._empty_cache(samples, context + self.config.window if roll else context) as cache:
            for drawn in draw_uniforms(sampling.seed, samples, sampling.max_new_tokens):
                uniforms = torch.from_numpy(drawn).to(self.device)
                # Nothing reads characters from before the context again, except the first time, from the prompt.
                dropped = max(0, end - context) if cache.length else 0
                start, end = start - dropped, end - dropped
                text = torch.cat((text[:, dropped : dropped + end], text.new_empty(uniforms.shape)), 1)
                for uniform in uniforms.unbind(1):
                    if not roll and end - start > context:
                        start = end - (context if sampling.overflow == "slide" else max(1, context // 2))
                        cache.clear()
                    *earlier, last = text[:, start + cache.length : end].split(context, 1)
                    for piece in earlier:
                        self.decoder(piece, cache, 1)
                        yield []
                    logits = self.decoder(last, cache, 1)[:, -1]
                    if sampling.repetition_penalty != 1:
                        logits = penalize(logits, text[:, max(0, end - context) : end], sampling.repetition_penalty)
                    ids = sample(logits, sampling, uniform)
                    text[:, end] = ids
                    end += 1
                    yield ids.tolist()

    @contextmanager
    def _empty_cache(self, samples: int, slots: int) -> Iterator[KVCache]:
        """Yield an empty cache: the last one if it fits, with the graph that was captured for it on a GPU."""
        cache, self._last_cache = self._last_cache, None
        if cache is None or (cache.batch_size, cache.slots) != (samples, slots):
            cache = None  # frees its memory before the next one is allocated
            cache = self.decoder.make_cache(samples, slots)
        cache.clear()
        try:
            yield cache
        finally:
            self._last_cache = cache
