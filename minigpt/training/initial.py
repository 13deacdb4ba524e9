"""Start of a training from an exported model: to continue with it, or to fine-tune it on another text."""

import hashlib
from pathlib import Path

import torch

from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.export import load_model
from minigpt.model import GPT

FREE = {"init", "dropout", "dropout_kind"}
"""Params of the model that may differ: they do not change what its weights compute."""


def initialize(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Set the weights of ``model`` to those of an exported model.

    Characters that both vocabularies have keep their rows of the embedding and of the head. The rows of the others stay
    as they were drawn.

    Raises:
        UserError: the exported model is missing, damaged or of another architecture, or shares no character.
    """
    try:
        source, known = load_model(folder)
    except UserError as error:
        raise UserError(
            f"train.init_from: {error}; name a copy of models/gpt, which DVC deletes before the training, and add it "
            "to git or DVC if the experiment runs with --temp or --queue"
        ) from None
    here, there = (each.config.model_dump(exclude=FREE) for each in (model, source))
    changed = {name: value for name, value in here.items() if there[name] != value}
    if changed:
        differing = [f"model.{name} is {there[name]} there and {value} here" for name, value in changed.items()]
        raise UserError(f"train.init_from: {folder} has another architecture: {', '.join(differing)}; use its params")
    ids = {character: index for index, character in enumerate(known.characters)}
    rows = [(row, ids[character]) for row, character in enumerate(tokenizer.characters) if character in ids]
    if not rows:
        raise UserError(f"train.init_from: {folder} has no character of this text; choose a model of the same script")
    new, old = torch.tensor(rows).T
    weights = source.state_dict()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name == "embedding.weight" or name.startswith("head."):
                weight[new] = weights[name][old]
            else:
                weight.copy_(weights[name])


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of the weights in ``folder``, or an empty text if there are none."""
    path = folder / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
