"""Small models with random weights, one for each switch of the architecture."""

import itertools

import torch

from helpers.workspace import params_with
from minigpt.choices import ACTIVATIONS
from minigpt.data.tokenizer import Tokenizer
from minigpt.export import export
from minigpt.model import GPT

SWITCHES = {
    "positions": ["learned", "rotary"],
    "attention_window": [1, 5, 8, 16],
    "activation": list(ACTIVATIONS),
    "norm_affine": [True, False],
    "qk_norm": [True, False],
    "embd_conv": [1, 4],
    "mlp_conv": [1, 4],
    "bias": [True, False],
    "tied_head": [True, False],
    "init": ["zero", "normal"],
}


CLASSIC = {
    "positions": "learned", "embd_conv": 1, "mlp_conv": 1, "embd_norm": False, "qk_norm": False, "norm_affine": True,
    "bias": True, "activation": "relu", "init": "normal",
}  # fmt: skip
ARCHITECTURES = [
    {},
    CLASSIC,
    {"attention_window": 5, "tied_head": True, "mlp_conv": 3},
    {"activation": "gelu", "mlp_ratio": 2.5},
    {"activation": "swiglu"},
    {"head_size": 64, "n_embd": 67, "block_size": 40},
]
"""Changes of the architecture that together use every part of it."""


def build(seed=0, **model):
    """Return a small model with random weights and these changes of the architecture."""
    torch.manual_seed(seed)
    gpt = GPT(params_with(model=model).model, vocab_size=11)
    for p in gpt.parameters():  # away from zero, so that every weight matters
        torch.nn.init.normal_(p, std=0.3)
    return gpt


def export_small(folder, characters="\nabc"):
    """Export a small model with random weights for these characters, and return its folder."""
    torch.manual_seed(0)
    gpt = GPT(params_with(model={"init": "normal"}).model, len(characters))
    export(folder, gpt.config, gpt.state_dict(), Tokenizer(characters))
    return folder


def variants():
    """Yield changes of the architecture: each value of each switch, and each pair of positions and convolutions."""
    for name, values in SWITCHES.items():
        for value in values:
            yield {name: value}
    for positions, taps in itertools.product(SWITCHES["positions"], (1, 2, 4)):
        yield {"positions": positions, "embd_conv": taps, "mlp_conv": 5 - taps, "block_size": 300}
