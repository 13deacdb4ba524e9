"""Samples during a training: the text that the model writes at some steps, always from the same prompt and draws."""

from collections.abc import Sequence

import numpy as np
import torch

from minigpt.generation.sampling import draw_uniforms, sample
from minigpt.model import GPT, evaluation_mode
from minigpt.params import SamplingParams

SAMPLING = SamplingParams()
"""Sampling parameters: the defaults of the command line. Those of the section ``sample`` would retrain the model."""

WIDTH = 75
"""Characters of a line that are printed."""


@torch.no_grad()
def write_sample(model: GPT, prompt: Sequence[int], length: int, seed: int) -> list[int]:
    """Return the ids of ``length`` characters that the model writes after those of the prompt.

    It depends on the weights, the prompt and the seed alone, and draws nothing from torch's generator. At full context,
    the last half is read again.
    """
    device, context = model.embedding.weight.device, model.config.block_size
    # Drawn on the CPU: sums in the order of the characters (cumsum) have no deterministic kernel on some GPUs.
    uniforms = torch.from_numpy(np.concatenate([*draw_uniforms(seed, 1, length)], 1))
    text = torch.empty(1, len(prompt) + length, dtype=torch.int64, device=device)
    text[0, : len(prompt)] = torch.tensor(prompt)
    cache, first = model.make_cache(1), max(0, len(prompt) - context)
    with evaluation_mode(model):
        for number, end in enumerate(range(len(prompt), len(prompt) + length)):
            if end - first > context:
                first = end - max(1, context // 2)
                cache.clear()
            logits = model(text[:, first + cache.length : end], cache, 1)[:, -1]
            text[:, end] = sample(logits.cpu(), SAMPLING, uniforms[:, number])
    return text[0, len(prompt) :].tolist()


def indented(text: str) -> str:
    """Return a text for a terminal: long lines are cut, and characters that could control it are replaced."""
    lines = ("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line) for line in text.split("\n"))
    return "\n".join(f"  | {line[:WIDTH]}".rstrip() for line in lines)
