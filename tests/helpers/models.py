"""Small models with random weights, one for each switch of the architecture."""

import itertools

import torch

from helpers.workspace import params_with
from minigpt.model import GPT

SWITCHES = {
    "positions": ["learned", "rotary"],
    "attention_window": [1, 5, 8, 16],
    "activation": ["relu", "relu2", "gelu", "swiglu"],
    "norm_affine": [True, False],
    "qk_norm": [True, False],
    "embd_conv": [1, 4],
    "bias": [True, False],
    "tied_head": [True, False],
    "init": ["zero", "normal"],
}


def build(seed=0, **model):
    torch.manual_seed(seed)
    gpt = GPT(params_with(model=model).model, vocab_size=11)
    for p in gpt.parameters():  # away from zero, so that everything counts
        torch.nn.init.normal_(p, std=0.3)
    return gpt


def variants():
    """One model for each value of each switch, and each pair of positions and convolution."""
    for name, values in SWITCHES.items():
        for value in values:
            yield {name: value}
    for positions, taps in itertools.product(SWITCHES["positions"], (1, 2, 4)):
        yield {"positions": positions, "embd_conv": taps, "block_size": 300}
